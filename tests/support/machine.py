"""What a machine has: the tested versions and no GPU, where warnings are errors, or others.

Other versions have deprecations of their own, and torch has hints for GPUs: there only the warnings
of this package are errors, and a test of a part whose package is missing is skipped.
"""

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
PYTHON = (3, 11)

# How each warning of `warn_once` begins or reads: what else warns is not ours.
OURS = (
    r"\w+ runs on ",
    "attention weights are ",
    "attn_implementation is ",
    "skip_unread_rows",
)

_MISSING = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")
_PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn"}


def tested_versions() -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE))


def differences() -> list[str]:
    """What this machine has other than the tests are written for, each as a phrase."""
    found = []
    if sys.version_info[:2] != PYTHON:
        found.append("Python {}.{}, not {}.{}".format(*sys.version_info[:2], *PYTHON))
    for package, tested in tested_versions().items():
        try:
            installed = version(package).partition("+")[0]
        except PackageNotFoundError:
            found.append(f"no {package}")
            continue
        if installed != tested:
            found.append(f"{package} {installed}, not {tested}")
    if torch.cuda.is_available():
        found.append(f"a GPU, {torch.cuda.get_device_name()}")
    return found


def pytest_configure(config: pytest.Config) -> None:
    if differences():
        config.addinivalue_line("filterwarnings", "default")
        for message in OURS:
            config.addinivalue_line("filterwarnings", f"error:{message}:UserWarning")


def pytest_report_header() -> str:
    found = differences()
    if not found:
        return "machine: the tested versions, no GPU: every warning is an error"
    return f"machine: {'; '.join(found)}: of warnings our own are errors"


def _missing_package(name: str) -> str | None:
    """The package of constraints.txt that has this module and is not installed, if it is one."""
    top = name.partition(".")[0]
    package = _PACKAGE_OF.get(top, top)
    return package if f"no {package}" in differences() else None


def _skip_what_is_missing() -> Iterator[object]:
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if package := _missing_package(error.name or ""):
            pytest.skip(f"{package} is not installed")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item):
    return (yield from _skip_what_is_missing())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    return (yield from _skip_what_is_missing())


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    missing = _MISSING.search(str(report.longrepr)) if report.failed else None
    if missing and (package := _missing_package(missing[1])):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {package} is not installed")
    return report
