"""The benches import one another as scripts do: from the folder they lie in."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """`bench("roofline")` is that module of bench/."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))

    def load(name: str):
        return __import__(name)

    yield load
    # Its modules have names as short as `data` and `kernels`; nothing else may find them.
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
            del sys.modules[name]
