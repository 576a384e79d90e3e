"""What a judge reads beside the responses: the user's words, or the whole conversation."""

from collections.abc import Sequence


def last_user_message(messages: Sequence[dict[str, str]]) -> str:
    """Find what the user said last -> str, empty if the user said nothing."""
    for message in reversed(messages):
        if message.get("role") == "user":
            return message.get("content", "")
    return ""
