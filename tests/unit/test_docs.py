"""Tests that the development pages name exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
DOCS = TESTS.parent / "docs"
NAMED = {
    page.name: re.findall(r"`([\w/]+\.py)::(\w+)`", page.read_text()) for page in DOCS.rglob("*.md")
}


@pytest.mark.parametrize(
    ("file", "name"), sorted({pair for pairs in NAMED.values() for pair in pairs})
)
def test_each_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_fault_names_a_test() -> None:
    rows = [
        line
        for line in (DOCS / "development" / "faults.md").read_text().splitlines()
        if line[:2] == "| "
    ]
    faults = [row for row in rows if not row.startswith("| fault |")]
    assert len(faults) > 30
    for row in faults:
        assert "::test_" in row, row


def test_the_user_guide_does_not_refer_to_tests() -> None:
    assert {page for page, tests in NAMED.items() if tests} == {"faults.md", "tests.md"}
