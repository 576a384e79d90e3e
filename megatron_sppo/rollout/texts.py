"""What texts must be for tokenizers and files to take them."""


def text_fault(text: str) -> str | None:
    """Say what no tokenizer and no file can hold of a text -> one clause, or None."""
    if "\x00" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a surrogate pair at character {error.start}"
    return None
