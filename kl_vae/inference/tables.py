"""Names of files and models in CSV and Markdown, where some characters have a meaning."""

from __future__ import annotations

import re

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# "_" only outside of words: inside of them it is a plain character
_MARKDOWN = re.compile(r"[\\|`*\[\]<>&~$]|(?<!\w)_|_(?!\w)")


def csv_cell(text: str) -> str:
    """Return a text as a CSV cell that spreadsheets do not take for a formula.

    An apostrophe is put in front of a text that begins with `=`, `+`, `-`, `@`, tab or CR.
    """
    return f"'{text}" if text.startswith(_FORMULA) else text


def markdown_text(text: str) -> str:
    """Return a text, also a table cell, that Markdown shows as it is: without markup and HTML."""
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", text)
