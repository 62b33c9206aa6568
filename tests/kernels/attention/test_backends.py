"""One place decides what runs, and says so."""

import sys
import types
import warnings

import pytest
import torch

from beit_fast.kernels import _triton
from beit_fast.kernels._triton import Gpu, pretend
from beit_fast.kernels.attention import attention, attention_reference
from beit_fast.kernels.attention.backends import (
    Choice,
    choose_backend,
    use_backend,
    warn_of_fallback,
)


def qkv(dtype=torch.float32, K=16, device="cpu"):
    return torch.randn(2, 5, 3, 2, K, device=device).to(dtype).unbind(2)


def test_a_cpu_takes_its_own_path_for_what_sdpa_does_worse():
    trained = torch.zeros(2, 5, 5, requires_grad=True, device="cpu")
    assert choose_backend(*qkv(), trained, 0.0, None) == Choice("cpu")
    assert choose_backend(*qkv(), None, 0.1, None) == Choice("cpu")
    assert choose_backend(*qkv(), trained.detach(), 0.0, None) == Choice("sdpa")
    with torch.no_grad():
        assert choose_backend(*qkv(), trained, 0.0, None) == Choice("sdpa")


def test_an_unknown_back_end_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="pass one of triton, cpu, sdpa, xformers, reference"):
        choose_backend(*qkv(), None, 0.0, "flash")


@pytest.mark.promise("R22")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"dtype": torch.float64}, "not torch.float64"), ({"K": 136}, "up to 128 channels, not 136")],
    ids=["fp64", "K136"],
)
def test_triton_where_it_cannot_run_is_refused_with_the_reason(wrong, reason, device):
    with pytest.raises(ValueError, match=reason):
        choose_backend(*qkv(**wrong, device=device), None, 0.0, "triton")


@pytest.mark.promise("R22")
def test_an_old_gpu_is_refused_with_the_reason(device):
    with pretend(Gpu((7, 5), 40, 4 << 20)), pytest.raises(ValueError, match=r"capability 8\.0"):
        choose_backend(*qkv(device=device), None, 0.0, "triton")


@pytest.mark.promise("R22")
def test_a_fallback_is_told_once_for_each_reason(monkeypatch):
    monkeypatch.setattr(_triton, "_warned", set())
    choice = Choice("sdpa", fallback="the kernels take heads of up to 128 channels, not 136")
    with pytest.warns(UserWarning, match="runs on sdpa, slower and not deterministic: the"):
        warn_of_fallback(choice)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_fallback(choice)
        warn_of_fallback(Choice("triton"))


def test_xformers_that_is_not_installed_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match="pip install xformers"):
        attention(*qkv(), backend="xformers")


def test_xformers_gets_one_aligned_bias_for_every_image(monkeypatch):
    def memory_efficient_attention(query, key, value, attn_bias, p, scale):
        assert attn_bias.shape == (4, 2, 5, 5)
        assert attn_bias.stride(2) % 8 == 0  # in 16-bit elements, 16 bytes
        assert p == 0
        return attention_reference(query, key, value, attn_bias, scale=scale)

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = torch.randn(4, 5, 3, 2, 16).unbind(2)
    bias = torch.randn(2, 2, 5, 5)
    ours = attention(q, k, v, bias, backend="xformers")
    torch.testing.assert_close(ours, attention_reference(q, k, v, bias))


def test_a_block_of_code_may_prefer_one_and_a_call_another():
    with use_backend("reference"):
        assert choose_backend(*qkv(), None, 0.0, None) == Choice("reference")
        assert choose_backend(*qkv(), None, 0.0, "cpu") == Choice("cpu")
    assert choose_backend(*qkv(), None, 0.0, None) == Choice("sdpa")
    with pytest.raises(ValueError, match="pass one of"), use_backend("flash"):
        pass


def test_a_trained_bias_runs_fused_where_no_gradient_is_wanted(monkeypatch):
    def sdpa(*arguments, attn_mask, **options):
        assert not attn_mask.requires_grad
        return run(*arguments, attn_mask=attn_mask, **options)

    run = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    with torch.no_grad():
        attention(*qkv(), torch.zeros(2, 5, 5, requires_grad=True, device="cpu"), backend="sdpa")
