"""Docstrings that say what lies where name just what is there, and the front doors are whole."""

import ast
import importlib
import re
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
ROOMS = sorted(path.parent.name for path in KERNELS.glob("*/__init__.py"))
NAME = re.compile(r"[a-z_0-9]+/?")
INNER = {"pad_bias"}  # operators that no one calls from outside


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def docstring(path):
    return ast.get_docstring(tree(path)) or ""


def catalogued(text):
    """Names of a table: one and what it is, or several, two spaces or more apart."""
    names = []
    for line in text.splitlines():
        first, *others = re.split(r"\s{2,}", line)
        if NAME.fullmatch(first):
            several = all(NAME.fullmatch(other) for other in others)
            names += [first, *(others if several else ())]
    return names


def exported(path):
    """`__all__` of a module, None where it has none, and what it imports."""
    found, imported = None, []
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            found = ast.literal_eval(node.value)
        if isinstance(node, ast.ImportFrom):
            imported += [alias.name for alias in node.names]
    return found, imported


def doors():
    """Modules of the package with `__all__`, by the name under which they are imported."""
    inner = {path.parent.name: path for path in KERNELS.glob("*/__init__.py")}
    outer = {path.stem: path for path in KERNELS.glob("*.py") if path.stem != "__init__"}
    return {name: path for name, path in (inner | outer).items() if exported(path)[0] is not None}


def test_the_catalogue_names_every_folder_and_module():
    modules = {path.stem for path in KERNELS.glob("*.py")} - {"__init__"}
    named = catalogued(docstring(KERNELS / "__init__.py"))
    assert sorted(named) == sorted(modules | {f"{room}/" for room in ROOMS})


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_names_its_files(room):
    files = {path.name for path in (KERNELS / room).glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\w+\.py", docstring(KERNELS / room / "__init__.py"))) == files


def test_every_module_says_what_it_is():
    assert [path for path in KERNELS.rglob("*.py") if not docstring(path)] == []


@pytest.mark.parametrize("name", doors())
def test_a_front_door_gives_all_that_it_lists_and_lists_all_that_it_has(name):
    listed, imported = exported(doors()[name])
    module = importlib.import_module(f"beit_fast.kernels.{name}")
    assert listed == sorted(imported)
    assert [each for each in listed if not callable(getattr(module, each))] == []


def test_every_operator_has_a_front_door():
    text = "".join(path.read_text(encoding="utf-8") for path in KERNELS.rglob("*.py"))
    operators = set(re.findall(r'"beit_fast::(\w+)",? *\n? *f?"?\(', text))
    called = {name for name in operators - INNER if not name.endswith(("_backward", "_"))}
    assert len(called) >= 11
    assert called <= {each for path in doors().values() for each in exported(path)[0]}


def test_a_name_that_stands_in_a_table_is_read_as_one():
    text = "What it is:\n\nhead/    of rows, x  y\nlinear  x w^T\n\none  two_3  four/\nNot a table."
    assert catalogued(text) == ["head/", "linear", "one", "two_3", "four/"]
