"""What nobody writes shows."""

import pytest
import torch


@pytest.fixture
def nan_where_memory_is_fresh(monkeypatch):
    """What nobody writes shows: `new_empty` and `torch.empty` hand out NaN."""
    plain_new, plain_empty = torch.Tensor.new_empty, torch.empty

    def poisoned(tensor):
        if tensor.device.type == "meta" or torch._is_functional_tensor(tensor):
            return tensor
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: poisoned(plain_new(self, *a, **k))
    )
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(plain_empty(*a, **k)))
