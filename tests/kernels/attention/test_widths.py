"""Heads of every width, with biases small and large: nothing rounds a stored bias again."""

import pytest
import torch

from beit_fast.kernels._triton import A100, H100, pretend
from beit_fast.kernels.attention import attention, attention_lse_reference, attention_reference

WIDTHS = (8, 16, 24, 32, 40, 48, 64, 80, 96, 128)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# What xformers' own tests of attention allow in outputs, absolute and relative.
XFORMERS = {"fp16": (4e-3, 4e-4), "bf16": (2e-2, 5e-3)}


def inputs(N, K, size, dtype):
    """q, k, v and a bias of this standard deviation, in the dtype."""
    q, k, v = (torch.randn(2, N, 1, K).to(dtype) for _ in range(3))
    return q, k, v, (size * torch.randn(1, N, N)).to(dtype)


def eager(q, k, v, bias, scale):
    """Logits, weights and outputs in the dtype, as eager models have them."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = (scale * q) @ k.mT + bias
    return (logits.softmax(-1) @ v).transpose(1, 2)


def results(function, tensors):
    """Output, and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 20], ids=["small", "large"])
@pytest.mark.parametrize("K", WIDTHS)
def test_errors_are_at_most_twice_eagers(K, size, dtype):
    tensors = inputs(33, K, size, DTYPES[dtype])
    exact = results(attention_reference, [t.double() for t in tensors])
    theirs = results(lambda *t: eager(*t, K**-0.5), tensors)
    ours = results(lambda *t: attention(*t, backend="triton"), tensors)
    for name, want, their, our in zip(
        ("out", "dq", "dk", "dv", "dbias"), exact, theirs, ours, strict=True
    ):
        rounding = torch.finfo(DTYPES[dtype]).eps * want.abs().max()
        allowed = 2 * (their - want).abs().max() + rounding
        assert (our - want).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", WIDTHS)
def test_outputs_and_log_sum_exp_are_within_what_xformers_allows(K, dtype):
    q, k, v, bias = inputs(33, K, 20, DTYPES[dtype])
    out, lse = attention(q, k, v, bias, backend="triton", return_lse=True)
    exact = [t.double() for t in (q, k, v, bias)]
    atol, rtol = XFORMERS[dtype]
    torch.testing.assert_close(out.double(), attention_reference(*exact), atol=atol, rtol=rtol)
    wanted = attention_lse_reference(*exact[:2], exact[3])
    torch.testing.assert_close(lse.double(), wanted, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("gpu", [A100, H100], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("N", [33, 70], ids=["one-tile", "two-tiles"])
def test_every_backward_multiplies_a_bias_that_is_stored_undivided(N, trains, gpu):
    """Heads of 32: windows and Hopper have kernels of their own for them."""
    *qkv, bias = inputs(N, 32, 20, torch.float16)
    bias = bias.requires_grad_(trains)
    leaves = [t.requires_grad_() for t in qkv] + [bias] * trains
    exact = [t.detach().double().requires_grad_() for t in (*qkv, bias)]
    wanted = torch.autograd.grad(attention_reference(*exact).sum(), exact[: len(leaves)])
    with pretend(gpu):
        out = attention(*qkv, bias, backend="triton")
        found = torch.autograd.grad(out.sum(), leaves)
    for name, want, our in zip(("dq", "dk", "dv", "dbias"), wanted, found, strict=False):
        assert (our - want).norm() <= 4e-3 * (want.norm() + 1), name
