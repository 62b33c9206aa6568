"""fp8 products in the blocks, emulated."""

import sys

import pytest
import torch

from beit_fast.model.config import BeitConfig
from beit_fast.model.fp8 import use_fp8
from beit_fast.model.heads import BeitForMaskedImageModeling

CPU = torch.device("cpu")


def tiny(**changes):
    torch.manual_seed(0)
    values = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return BeitForMaskedImageModeling(BeitConfig(**values | {"vocab_size": 48} | changes))


def inputs():
    torch.manual_seed(1)
    mask = torch.rand(4, 16) < 0.4
    index = mask.flatten().nonzero().flatten().int()
    return torch.randn(4, 3, 32, 32), mask, index, torch.randint(48, (4, 16))


def test_only_the_blocks_products_are_rounded_and_names_stay():
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q_bias.normal_()
    names = list(model.state_dict())
    exact, _ = model.loss(*inputs())
    exact.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    use_fp8(model, CPU)
    assert list(model.state_dict()) == names
    rounded, _ = model.loss(*inputs())
    rounded.backward()
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-6)
        assert error < 0.15, name  # e4m3 has three bits behind the point: 6 % a number at worst


def test_widths_that_the_hardware_cannot_multiply_are_refused_by_name():
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv is \(72, 24\)"):
        use_fp8(tiny(embed_dim=24), CPU)


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=r'pip install "beit_fast\[fp8\]"'):
        use_fp8(tiny(), CPU)
