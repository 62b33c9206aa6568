"""Seeds and threads: every test starts from the same random state, on a known number of cores."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Grain imports jax where jax is installed

import pytest
import torch

torch.set_num_threads(1)  # sums of two threads differ from sums of one in the last bits


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
