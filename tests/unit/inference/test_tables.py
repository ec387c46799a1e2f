"""Unusual names in tables."""

from __future__ import annotations

import pytest

from kl_vae.inference.tables import csv_cell, markdown_text


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_is_a_formula(start: str) -> None:
    assert csv_cell(f"{start}1+1") == f"'{start}1+1"
    assert csv_cell(f"a{start}") == f"a{start}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/kl_f8 (256 x 256), 3.5", "runs/kl_f8 (256 x 256), 3.5"),
        ("a|b\\", "a\\|b\\\\"),
        ("<b>&amp;", "\\<b\\>\\&amp;"),
        ("_a_ *b* `c` ~d~", "\\_a\\_ \\*b\\* \\`c\\` \\~d\\~"),
        ("![x](y) $z$", "!\\[x\\](y) \\$z\\$"),
    ],
)
def test_markdown_shows_the_text_itself(text: str, expected: str) -> None:
    assert markdown_text(text) == expected
