import math

import pytest
import torch
from torch.distributions import (
    Categorical,
    Laplace,
    SigmoidTransform,
    TransformedDistribution,
    kl_divergence,
)

from beit_fast.tokenizer.dvae import DvaeOutput, map_pixels
from beit_fast.tokenizer.loss import dvae_loss, kl_to_uniform, logit_laplace_nll


def test_logit_laplace_is_a_laplace_variable_seen_through_a_sigmoid():
    mu, log_scale = torch.randn(2, 1000, dtype=torch.float64)
    mapped = torch.rand(1000, dtype=torch.float64) * 0.8 + 0.1
    peer = TransformedDistribution(Laplace(mu, log_scale.exp()), SigmoidTransform())
    torch.testing.assert_close(logit_laplace_nll(mapped, mu, log_scale), -peer.log_prob(mapped))


def test_logit_laplace_integrates_to_one():
    x = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    density = torch.exp(-logit_laplace_nll(x, torch.tensor(0.4), torch.tensor(-0.7)))
    assert density.mean().item() == pytest.approx(1, abs=1e-5)


def test_kl_to_uniform_is_that_of_the_distributions_and_bounded_by_ln_v():
    logits = torch.randn(2, 50, 3, 4, dtype=torch.float64) * 3
    rows = logits.permute(0, 2, 3, 1)
    expected = kl_divergence(Categorical(logits=rows), Categorical(logits=torch.zeros_like(rows)))
    torch.testing.assert_close(kl_to_uniform(logits), expected)
    assert kl_to_uniform(torch.zeros(1, 50, 1, 1)).item() == pytest.approx(0, abs=1e-6)
    one_hot = torch.eye(50)[:1, :, None, None] * 1000
    assert kl_to_uniform(one_hot).item() == pytest.approx(math.log(50), rel=1e-6)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 40)])
def test_a_position_weighs_beta_over_192_at_any_image_size(height, width):
    logits = torch.randn(2, 10, height // 8, width // 8)
    pixels = map_pixels(torch.rand(2, 3, height, width))
    output = DvaeOutput(logits, torch.zeros_like(pixels), torch.zeros_like(pixels), pixels)
    plain, weighted = dvae_loss(output, 0.0), dvae_loss(output, 6.6)
    torch.testing.assert_close(plain.total, plain.reconstruction)
    expected = 6.6 / 192 * kl_to_uniform(logits).mean()
    torch.testing.assert_close(weighted.total - plain.total, expected, rtol=1e-4, atol=1e-6)
