import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import machine

ROOT = Path(machine.__file__).parents[2]
CONFTEST = """
from pathlib import Path

import machine

machine.CONSTRAINTS = Path(__file__).with_name("constraints.txt")
from machine import *
"""
TESTS = """
import warnings


def test_foreign():
    warnings.warn("numpy deprecates this", DeprecationWarning)


def test_ours():
    warnings.warn("conv runs on torch, slower than triton: no reason")


def test_missing():
    import a_package_that_nobody_has
"""


@pytest.fixture
def outcomes(tmp_path):
    """`outcomes(constraints)`: what pytest prints of three tests on a machine of these versions."""

    def run(constraints: str) -> str:
        (tmp_path / "conftest.py").write_text(CONFTEST)
        (tmp_path / "constraints.txt").write_text(constraints)
        (tmp_path / "test_it.py").write_text(TESTS)
        settings = re.findall(r"^filterwarnings = .*$", (ROOT / "pyproject.toml").read_text(), re.M)
        (tmp_path / "pyproject.toml").write_text(
            "\n".join(
                ["[tool.pytest.ini_options]", f"pythonpath = ['{ROOT}/tests/support']", *settings]
            )
        )
        command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "test_it.py"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout

    return run


TESTED = "".join(f"{name}=={v}\n" for name, v in machine.tested_versions().items())


def test_other_versions_or_a_gpu_leave_only_our_own_warnings_errors(outcomes):
    out = outcomes(TESTED.replace("numpy==", "numpy==0."))
    assert re.search(r"machine: .*numpy [\d.]+, not 0\..*: of warnings our own are errors", out)
    assert "PASSED test_it.py::test_foreign" in out
    assert "FAILED test_it.py::test_ours - UserWarning: conv runs on torch" in out


@pytest.mark.skipif(bool(machine.differences()), reason="this machine has other versions")
def test_with_the_tested_versions_every_warning_is_an_error(outcomes):
    out = outcomes(TESTED)
    assert "machine: the tested versions, no GPU: every warning is an error" in out
    assert "FAILED test_it.py::test_foreign - DeprecationWarning" in out
    assert "FAILED test_it.py::test_ours" in out


def test_a_missing_package_skips_a_test_where_it_is_of_the_tested_ones_alone(outcomes):
    out = outcomes(TESTED + "a_package_that_nobody_has==1.0\n")
    assert "no a_package_that_nobody_has" in out
    assert re.search(r"SKIPPED .*a_package_that_nobody_has is not installed", out)
    assert "FAILED test_it.py::test_missing - ModuleNotFoundError" in outcomes(TESTED)


def test_a_file_of_tests_that_imports_a_missing_package_is_skipped(outcomes, monkeypatch):
    monkeypatch.setattr(f"{__name__}.TESTS", "import a_package_that_nobody_has\n" + TESTS)
    out = outcomes(TESTED + "a_package_that_nobody_has==1.0\n")
    assert re.search(r"SKIPPED .*a_package_that_nobody_has is not installed", out)


def test_what_every_test_of_a_folder_imports_needs_no_extra():
    """pytest skips a file of tests for a missing package, but ends where a conftest.py needs it."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = set(re.findall(r'^ {8,}"([\w-]+)', setup.partition("extras_require")[2], re.MULTILINE))
    modules = {module for module, package in machine._PACKAGE_OF.items() if package in extras}
    modules |= extras - {"pytest"}
    assert {"transformers", "torchao", "sklearn"} <= modules
    shared = [p for p in (ROOT / "tests/support").glob("*.py") if not p.name.startswith("test_")]
    shared += (ROOT / "tests").rglob("conftest.py")
    assert len(shared) > 20
    for path in shared:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                tops = {name.partition(".")[0] for name in names if name}
                assert not tops & modules, f"{path}: {tops & modules}"


def test_every_warning_of_the_package_is_known_as_ours():
    calls = []
    for path in [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "beit_fast").rglob("*.py")]:
        source = path.read_text()
        calls += re.findall(r'warn_once\(\s*f?"([^"]*)"', source)
        assert path.name == "_triton.py" or "warnings.warn(" not in source, path
        assert len(re.findall(r"(?<!def )warn_once\(", source)) == len(
            re.findall(r'warn_once\(\s*f?"', source)
        )
    assert len(calls) > 5
    for message in (re.sub(r"\{[^{}]*\}", "x", call) for call in calls):
        assert any(re.match(ours, message) for ours in machine.OURS), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
def test_kernels_are_interpreted_where_nobody_said_so():
    """Not only in processes that inherit the variable, as those of xdist do."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    test = "tests/support/test_two_devices.py::test_the_operators_of_the_package_are_checked_inside"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", test]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
