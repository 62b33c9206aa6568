"""The toy of toy.py as fixtures."""

import pytest

from toy import ToyTask, train_toy


@pytest.fixture
def toy_task():
    return ToyTask


@pytest.fixture
def run_toy():
    return train_toy
