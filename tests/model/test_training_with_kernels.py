"""Tiny models trained twenty steps with the kernels and with the references agree."""

import copy

import pytest
import torch

from beit_fast.kernels.attention_backends import use_backend
from beit_fast.model.heads import BeitForMaskedImageModeling

STEPS = 20


def train(model, backend):
    """The loss of each step, on the same images and masks every time."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with use_backend(backend):
        for _ in range(STEPS):
            images = torch.randn(4, 3, 16, 16, generator=generator)
            mask = torch.rand(4, 4, generator=generator) < 0.4
            index = torch.where(mask.flatten(), torch.arange(16), -1).int()
            tokens = (images.unfold(2, 8, 8).unfold(3, 8, 8).mean((1, 4, 5)) > 0).long().flatten(1)
            loss, _ = model.loss(images, mask, index, tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}],
    ids=["shared-table", "own-tables"],
)
def test_attention_by_the_kernels_trains_as_by_the_reference(tiny, fields):
    model = BeitForMaskedImageModeling(tiny(img_size=16, num_heads=2, **fields))
    losses = {name: train(copy.deepcopy(model), name) for name in ("reference", "triton", "cpu")}
    assert losses["reference"][-1] < 0.6 * losses["reference"][0]  # it learns
    for name in ("triton", "cpu"):
        torch.testing.assert_close(losses[name], losses["reference"], rtol=1e-3, atol=1e-4)
