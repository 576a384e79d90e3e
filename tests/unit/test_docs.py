"""Proves that the pages written from the code are what the code says now."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_messages_has_every_message() -> None:
    spec = importlib.util.spec_from_file_location("troubleshooting", DOCS / "troubleshooting.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert written == module.page(), "run: python docs/troubleshooting.py"
    assert (
        "(...%) answers were cut at max_tokens: they have no end to be judged by | Use more --max-tokens. |" in written
    )
    assert written.count("\n|") > 300  # a page that finds no messages would agree with itself
