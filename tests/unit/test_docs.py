"""Tests that the development pages name exist."""

import ast
import re
from pathlib import Path

import pytest

from kl_vae.cli.main import COMMANDS

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


FAULTS = (DOCS / "development" / "faults.md").read_text()


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_fault_names_a_test_for_each_command() -> None:
    header, _, *rows = (line for line in FAULTS.partition("\n## By")[2].splitlines() if "|" in line)
    matrix = rows[: next(i for i, row in enumerate(rows) if row.startswith("| fault |"))]
    assert set(cells_of(header)) == {"fault", *COMMANDS}
    assert len(matrix) >= 16
    listed = set(re.findall(r"^(\d+)\. `", FAULTS, re.MULTILINE))
    for row in matrix:
        for cell in cells_of(row)[1:]:
            named = set(re.findall(r"\d+", cell))
            assert named <= listed and (named or cell == "reads none"), row


def test_each_fault_names_a_test() -> None:
    rows = [line for line in FAULTS.splitlines() if line.startswith("| ") and "::" in line]
    tables = re.findall(r"^\| fault \| behaviour .*", FAULTS, re.MULTILINE)
    assert len(tables) == 4 and len(rows) > 30
    after = FAULTS.partition("\n## Processes")[2].splitlines()
    faults = [line for line in after if line[:2] == "| " and not line.startswith("| fault |")]
    for row in faults:
        assert "::test_" in row, row


def test_the_user_guide_does_not_refer_to_tests() -> None:
    assert {page for page, tests in NAMED.items() if tests} == {"faults.md", "tests.md"}
