"""Tiny models trained twenty steps with the kernels and with the references agree."""

import copy

import pytest
import torch

from beit_fast.kernels.attention.backends import use_backend
from beit_fast.model.heads import BeitForMaskedImageModeling
from tiny_models import PER_BLOCK

STEPS = 20


def train(model, backend, device):
    """The loss of each step, on the same images and masks every time."""
    model = copy.deepcopy(model).to(device)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with use_backend(backend):
        for _ in range(STEPS):
            images = torch.randn(4, 3, 16, 16, generator=generator)
            mask = torch.rand(4, 4, generator=generator) < 0.4
            index = torch.where(mask.flatten(), torch.arange(16), -1).int()
            tokens = (images.unfold(2, 8, 8).unfold(3, 8, 8).mean((1, 4, 5)) > 0).long().flatten(1)
            batch = (x.to(device) for x in (images, mask, index, tokens))
            loss, _ = model.loss(*batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(
    "fields",
    [{}, PER_BLOCK],
    ids=["shared-table", "own-tables"],
)
def test_attention_by_the_kernels_trains_as_by_the_reference(tiny, fields, device):
    model = BeitForMaskedImageModeling(tiny(img_size=16, num_heads=2, **fields))
    for name, there in (("triton", device), ("cpu", torch.device("cpu"))):
        reference, losses = train(model, "reference", there), train(model, name, there)
        assert reference[-1] < 0.6 * reference[0]  # it learns
        torch.testing.assert_close(losses, reference, rtol=1e-3, atol=1e-4)
