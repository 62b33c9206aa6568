"""docs/reliability.md's table of promises: all of them, each with tests that are marked with it."""

import ast
import re
from pathlib import Path

import pytest

from pages import ROOT, text_of

PAGE = ROOT / "docs" / "reliability.md"
IDS = [f"R{number}" for number in range(1, 28)] + [f"S{number}" for number in range(1, 11)]
ROW = re.compile(r"^\| ([RS]\d+) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)


def rows() -> dict[str, re.Match]:
    return {row[1]: row for row in ROW.finditer(text_of(PAGE))}


def marked(path: Path) -> set[str]:
    """The promises that tests of a file are marked with."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    marks = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "promise"]
    return {argument.value for call in marks for argument in call.args}


@pytest.fixture(scope="module")
def all_marked():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return {path: found for path in files if (found := marked(path))}


def test_every_promise_has_a_row_in_order():
    found = [row[1] for row in ROW.finditer(text_of(PAGE))]
    assert found == IDS


def test_every_row_names_files_whose_tests_are_marked(all_marked):
    for number, row in rows().items():
        named = {ROOT / path for path in re.findall(r"`(tests/[\w/.]+)`", row[3])}
        assert named, number
        others = [path.name for path in named if number not in all_marked.get(path, ())]
        assert not others, (number, others)


def test_no_test_is_marked_with_a_promise_that_is_none(all_marked):
    assert set().union(*all_marked.values()) <= set(IDS)


def test_marks_of_a_file_and_of_a_test_are_found(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        'pytestmark = pytest.mark.promise("R1", "R2")\n'
        '@pytest.mark.promise("S3")\ndef test_it(): ...\n'
    )
    assert marked(file) == {"R1", "R2", "S3"}
