"""How tests look at messages: the key, the value and the fix, not the sentence around them."""

from __future__ import annotations

import re


def mentions(*parts: object) -> str:
    """Return a pattern of texts that contain all parts, in any order, for `pytest.raises(match=)`.

    A part that begins or ends with a letter or digit matches whole words only: 4 is not in 40.
    """

    def word(text: str) -> str:
        start = r"\b" if text[:1].isalnum() else ""
        end = r"\b" if text[-1:].isalnum() else ""
        return f"{start}{re.escape(text)}{end}"

    return r"(?s)\A" + "".join(f"(?=.*{word(str(part))})" for part in parts)


def is_about(text: str, *parts: object) -> bool:
    """Return whether a text contains all parts, in any order."""
    return re.search(mentions(*parts), text) is not None
