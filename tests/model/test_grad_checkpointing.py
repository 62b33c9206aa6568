"""Recomputing in the backward pass: the same numbers from less memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.model.beit import KEPT
from beit_fast.model.heads import BeitForMaskedImageModeling

MODES = [False, "selective", True]


def inputs(B=2, L=16):
    mask = torch.rand(B, L, generator=torch.Generator().manual_seed(0)) < 0.4
    index = mask.flatten().nonzero().flatten().int()
    return torch.randn(B, 3, 32, 32), mask, index, torch.randint(24, (B, L))


def bytes_saved(model, arguments):
    """Of distinct memory that autograd holds after the forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model.loss(*arguments)
    total = sum(saved.values())
    loss.backward()
    return total


@pytest.mark.parametrize("rate", [0.0, 0.5], ids=["plain", "drop-path"])
def test_gradients_are_those_without_and_memory_falls(tiny, randomize, gradients, rate):
    fields = {"depth": 4, "embed_dim": 64, "drop_path_rate": rate}
    model = randomize(BeitForMaskedImageModeling(tiny(**fields)))
    arguments = inputs()
    results, memory = {}, {}
    for mode in MODES:
        model.set_grad_checkpointing(mode)
        model.zero_grad()
        torch.manual_seed(1)
        memory[mode] = bytes_saved(model, arguments)
        results[mode] = gradients(model)
    for mode in MODES[1:]:
        for name, value in results[False].items():
            torch.testing.assert_close(results[mode][name], value, msg=f"{mode} {name}")
    # What selective checkpointing keeps lies in caches of its own, which no hook sees.
    assert memory[True] < 0.5 * memory[False]


class Calls(TorchDispatchMode):
    """Counts products and attentions, and GELUs."""

    def __init__(self):
        super().__init__()
        self.kept = self.gelu = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kept += func.name() in KEPT
        self.gelu += func.overloadpacket is torch.ops.aten.gelu
        return func(*args, **(kwargs or {}))


def test_selective_recomputes_no_product_and_no_attention(tiny, randomize):
    model = randomize(BeitForMaskedImageModeling(tiny(depth=3)))
    arguments = inputs()
    kept, gelu = {}, {}
    for mode in MODES:
        model.set_grad_checkpointing(mode)
        with Calls() as calls:
            model.loss(*arguments)[0].backward()
        kept[mode], gelu[mode] = calls.kept, calls.gelu
    assert kept["selective"] == kept[False] < kept[True]
    assert gelu == {False: 3, "selective": 6, True: 6}


def test_another_word_is_refused(tiny):
    with pytest.raises(ValueError, match="pass True, False or 'selective'"):
        BeitForMaskedImageModeling(tiny()).set_grad_checkpointing("some")
