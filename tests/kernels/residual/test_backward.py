"""How exact the sums over rows are, at a number of rows that models have."""

import pytest
import torch
import torch.nn.functional as F

from beit_fast.kernels.residual.backward import scale_residual_backward, sum_shares

VECTORS = ("dbias_ptr", "dgamma_ptr", "dnorm_weight_ptr", "dnorm_bias_ptr")


def worst(ours, exact):
    return (ours.double() - exact).abs().max()


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_added_as_exactly_as_by_torch(seed, device):
    generator = torch.Generator(device).manual_seed(seed)
    shares = torch.randn(4, 197, 768, generator=generator, device=device)
    sums = torch.full((4, 768), torch.nan, device=device)
    sum_shares(shares, **dict(zip(VECTORS, sums, strict=True)))
    exact = shares.double().sum(dim=1)
    assert worst(sums, exact) <= worst(shares.sum(dim=1), exact)


def test_the_norms_gradients_over_394_rows_are_as_exact_as_by_torchs_operators(device):
    x, dln = torch.randn(2, 2, 197, 768, device=device)
    weight = torch.randn(768, device=device)
    mean, variance = x.mean(dim=-1), x.var(dim=-1, unbiased=False)
    rstd = (variance + 1e-6).rsqrt()
    ours = [torch.full((768,), torch.nan, device=device) for _ in range(2)]
    scale_residual_backward(
        None, dln, x, mean, rstd, weight, *[None] * 6, shape=x.shape, scale=1.0, dropout_p=0.0,
        drop_path_p=0.0, rng=None, dx=None, dbranch=None, dbias=None, dgamma=None,
        dnorm_weight=ours[0], dnorm_bias=ours[1],
    )  # fmt: skip

    def by_torch(x, dln):
        y = F.layer_norm(x, x.shape[2:], eps=1e-6)
        return (dln * y).sum((0, 1)), dln.sum((0, 1))

    exact, theirs = by_torch(x.double(), dln.double()), by_torch(x, dln)
    for our, their, want in zip(ours, theirs, exact, strict=True):
        assert worst(our, want) <= 2 * worst(their, want)
