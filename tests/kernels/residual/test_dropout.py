"""Which elements and samples are dropped, and when the draw is another."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from beit_fast.kernels.philox import draw_rng, keep_mask_reference
from beit_fast.kernels.residual import scale_residual, scale_residual_norm
from beit_fast.kernels.residual.drop_path import drop_path_keep_reference
from residual_cases import rng_on

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")


def test_the_mask_of_the_kernel_is_that_of_the_reference_forward_and_backward(device):
    B, N, D = 2, 5, 200
    rng = rng_on(device)
    x = torch.zeros(B, N, D, device=device)
    branch = torch.ones(B, N, D, device=device, requires_grad=True)
    out = scale_residual(x, branch, dropout_p=0.3, rng=rng, backend="triton")
    streams = torch.arange(B * N, device=device)
    mask = keep_mask_reference(rng, 0.3, 1, D, streams).view(B, N, D)
    assert torch.equal(out != 0, mask)
    torch.testing.assert_close(out[mask], torch.full_like(out[mask], 1 / 0.7))
    out.sum().backward()
    assert torch.equal(branch.grad, out.detach())


def test_the_samples_that_the_kernel_drops_are_those_of_the_reference(device):
    B = 40
    rng = rng_on(device)
    x, branch = torch.zeros(B, 1, 16, device=device), torch.ones(B, 1, 16, device=device)
    out = scale_residual(x, branch, drop_path_p=0.3, rng=rng, backend="triton")
    keep = drop_path_keep_reference(rng, 0.3, B)
    assert torch.equal(out[:, 0, 0], keep / 0.7)
    assert 0 < keep.sum() < B


def test_rewriting_the_rng_in_place_draws_other_masks(device):
    rng = rng_on(device)
    x, branch = torch.zeros(1, 2, 64, device=device), torch.ones(1, 2, 64, device=device)

    def draw():
        return scale_residual(x, branch, dropout_p=0.5, rng=rng, backend="triton")

    first, again = draw(), draw()
    rng[1] += 1  # what a graph that holds `draw_rng` does at each replay
    assert torch.equal(first, again)
    assert not torch.equal(first, draw())


def test_without_an_rng_each_call_draws_from_the_default_generator():
    x, branch = torch.zeros(2, 3, 64), torch.ones(2, 3, 64)
    torch.manual_seed(3)
    first, second = (scale_residual(x, branch, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, scale_residual(x, branch, dropout_p=0.5))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    rng = draw_rng(x.device)
    assert torch.equal(first, scale_residual(x, branch, dropout_p=0.5, rng=rng))


def test_a_checkpoint_draws_the_same_masks_again(device):
    x, branch = (torch.randn(2, 3, 64, device=device, requires_grad=True) for _ in range(2))

    def step(x, branch):
        return scale_residual_norm(x, branch, dropout_p=0.5, backend="triton")

    results = []
    for function in (step, lambda *a: checkpoint(step, *a, use_reentrant=False)):
        torch.manual_seed(4)
        out, ln = function(x, branch)
        results.append([out, ln, *torch.autograd.grad(out.sum() + ln.square().sum(), (x, branch))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
