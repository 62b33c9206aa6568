"""The CPU's attention: its parts, its fused forward, and biases far from zero."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.kernels.attention import attention_qkvpacked, attention_reference
from beit_fast.kernels.attention import cpu as module
from beit_fast.kernels.attention.cpu import attention_cpu

ours = functools.partial(attention_qkvpacked, backend="cpu")


@pytest.fixture(autouse=True)
def _on_a_cpu():
    with torch.device("cpu"):
        yield


class Names(TorchDispatchMode):
    """The operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def packed_reference(qkv, bias=None, **options):
    return attention_reference(*qkv.unbind(2), bias, **options)


def forward(dropout_p=0.0):
    q, k, v = torch.randn(3, 2, 9, 2, 8).unbind()
    rng = torch.tensor([1, 2])
    with Names() as calls:
        attention_cpu(
            q, k, v, torch.randn(1, 2, 9, 9), rng, 0.3, dropout_p, lse=q.new_empty(2, 2, 9)
        )
    return calls.names


def test_the_forward_of_a_trained_bias_is_torchs_fused_attention():
    fused = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert forward().count(fused) == 1
    assert not any("bmm" in name for name in forward())
    assert fused not in forward(dropout_p=0.5)  # it has no dropout that the reference can repeat


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("B", "G", "H", "most"),
    [(5, 1, 3, 2), (6, 2, 3, 2), (6, 3, 5, 4), (2, 1, 5, 6), (3, 3, 2, 1)],
    ids=["images-2-2-1", "groups", "heads-2-2-1", "heads-3-2", "one-slice"],
)
def test_any_division_into_parts_is_as_exact_as_the_reference(
    monkeypatch, assert_as_exact_as_reference, B, G, H, most, dtype, fused
):
    N = 7
    threads = torch.get_num_threads()
    monkeypatch.setattr(module, "SCORES_AT_A_TIME", -(-most * N * N // threads))
    monkeypatch.setattr(module, "_has_flash", lambda: fused)
    tensors = [torch.randn(B, N, 3, H, 8), torch.randn(G, H, N, N)]
    assert_as_exact_as_reference(ours, packed_reference, tensors, dtype)


@pytest.mark.parametrize("draw", range(4))
@pytest.mark.parametrize(
    ("factor", "raised", "dtype"),
    [
        (5, 0, torch.float32),
        (8, 0, torch.float32),
        (1, 10, torch.float32),
        (1, 9999, torch.float32),
        (5, 0, torch.bfloat16),
    ],
    ids=["x5", "x8", "key-10", "key-9999", "x5-bf16"],
)
def test_large_logits_are_as_exact_as_the_reference(
    assert_as_exact_as_reference, factor, raised, dtype, draw
):
    torch.manual_seed(draw)
    qkv, bias = factor * torch.randn(2, 50, 3, 3, 16), torch.randn(3, 50, 50)
    bias[..., 7] += raised
    assert_as_exact_as_reference(ours, packed_reference, [qkv, bias], dtype)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "products"])
def test_rows_of_large_negative_biases_have_the_gradients_of_rows_near_zero(monkeypatch, fused):
    monkeypatch.setattr(module, "_has_flash", lambda: fused)
    qkv, bias = torch.randn(2, 6, 3, 2, 8), torch.zeros(2, 6, 6)
    bias[:, 3] = -1e9
    wanted = _gradients(ours, qkv, torch.zeros_like(bias))
    for value, want in zip(_gradients(ours, qkv, bias), wanted, strict=True):
        torch.testing.assert_close(value, want)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "products"])
def test_hidden_keys_and_queries_that_see_none_are_as_in_the_reference(monkeypatch, fused):
    monkeypatch.setattr(module, "_has_flash", lambda: fused)
    qkv, bias = torch.randn(2, 6, 3, 2, 8), torch.randn(2, 6, 6)
    bias[0, 3] = -torch.inf
    bias[:, :, 5] = -torch.inf
    results = _gradients(ours, qkv, bias), _gradients(packed_reference, qkv, bias)
    for value, want in zip(*results, strict=True):
        torch.testing.assert_close(value, want)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_the_same_call_gives_the_same_bits(dropout_p):
    qkv, bias = torch.randn(5, 17, 3, 2, 8), torch.randn(2, 17, 17)
    options = {"dropout_p": dropout_p, "rng": torch.tensor([1, 2])}
    run = functools.partial(ours, **options)
    for one, other in zip(_gradients(run, qkv, bias), _gradients(run, qkv, bias), strict=True):
        assert torch.equal(one, other)


def _gradients(function, qkv, bias):
    leaves = [t.detach().requires_grad_() for t in (qkv, bias)]
    out = function(*leaves)
    return out, *torch.autograd.grad(out.square().sum(), leaves)
