"""Which weights dropout drops, and when it draws anew."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attention_cases import OURS, gradients, packed_reference
from beit_fast.kernels.attention import attention_qkvpacked


@OURS
def test_dropout_is_that_of_the_reference_forward_and_backward(backend):
    qkv, bias, rng = torch.randn(2, 21, 3, 2, 16), torch.randn(2, 21, 21), torch.tensor([5, 7])
    options = {"dropout_p": 0.3, "rng": rng}
    ours = gradients(lambda *t: attention_qkvpacked(*t, backend=backend, **options), qkv, bias)
    theirs = gradients(lambda *t: packed_reference(*t, **options), qkv, bias)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton", "sdpa", "reference", None])
def test_dropout_keeps_the_mean_and_drops_the_share_asked_for(backend):
    N, p = 64, 0.3
    qkv = torch.zeros(8, N, 3, 2, N)
    qkv[:, :, 2] = torch.eye(N)[:, None]  # so that the output is the weights
    weights = attention_qkvpacked(qkv, dropout_p=p, backend=backend) * N
    assert (weights == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert weights.mean().item() == pytest.approx(1, abs=0.01)


@OURS
def test_a_checkpointed_layer_drops_the_same_again(backend):
    qkv, bias = torch.randn(2, 9, 3, 2, 16), torch.randn(2, 9, 9)
    run = functools.partial(attention_qkvpacked, dropout_p=0.5, backend=backend)
    results = []
    for function in (run, lambda *t: checkpoint(run, *t, use_reentrant=False)):
        torch.manual_seed(1)
        results.append(gradients(function, qkv, bias))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_each_call_drops_anew():
    qkv = torch.randn(2, 9, 3, 2, 16)
    first, second = (attention_qkvpacked(qkv, dropout_p=0.5, backend="cpu") for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_replayed_graph_drops_anew_and_is_right_without_dropout():
    qkv, bias = torch.randn(2, 197, 3, 2, 64).bfloat16(), torch.randn(2, 197, 197)
    for dropout_p in (0.0, 0.2):
        run = functools.partial(attention_qkvpacked, backend="triton", dropout_p=dropout_p)
        gradients(run, qkv, bias)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients(run, qkv, bias)
        replays = []
        for _ in range(2):
            graph.replay()
            replays.append([t.detach().clone() for t in captured])
        same = [torch.equal(one, other) for one, other in zip(*replays, strict=True)]
        assert all(same) if dropout_p == 0 else not any(same)
        if dropout_p == 0:
            for one, other in zip(replays[0], gradients(run, qkv, bias), strict=True):
                assert torch.equal(one, other)
