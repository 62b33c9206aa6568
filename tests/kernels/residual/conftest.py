"""What nobody writes shows."""

import pytest
import torch


@pytest.fixture
def new_memory_is_nan():
    """An element that nobody writes shows: in this mode torch fills `empty`."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
