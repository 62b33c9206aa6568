import pytest
import torch

from beit_fast.kernels.philox import draw_rng, keep_mask_reference
from beit_fast.kernels.residual import scale_residual
from beit_fast.kernels.residual.drop_path import (
    draw_kept_samples,
    drop_path_keep_reference,
    num_kept,
)


@pytest.mark.parametrize(
    ("num_samples", "p", "count"),
    [(256, 0.1, 230), (256, 0.0, 256), (10, 0.05, 10), (3, 0.9, 1), (1, 0.5, 1), (0, 0.5, 0)],
)
def test_the_number_kept_is_fixed_and_rounded(num_samples, p, count):
    assert num_kept(num_samples, p) == count
    samples, slots = draw_kept_samples(num_samples, p)
    assert samples.shape == (count,)
    assert slots.shape == (num_samples,)
    assert samples.unique().tolist() == samples.tolist()  # ascending, none twice
    assert torch.equal(slots[samples], torch.arange(count, dtype=torch.int32))
    assert (slots == -1).sum() == num_samples - count


def test_every_sample_and_every_pair_is_kept_equally_often():
    draws, B, C = 4000, 6, 4
    kept = torch.stack([draw_kept_samples(B, 1 - C / B).slots >= 0 for _ in range(draws)]).double()
    single, pair = C / B, C * (C - 1) / (B * (B - 1))
    rates, pairs = kept.mean(dim=0), kept.T @ kept / draws
    assert (rates - single).abs().max() < 5 * (single * (1 - single) / draws) ** 0.5
    apart = ~torch.eye(B, dtype=torch.bool)
    assert (pairs[apart] - pair).abs().max() < 5 * (pair * (1 - pair) / draws) ** 0.5


def test_the_scale_makes_the_branch_unbiased():
    draws, B = 2000, 5
    x, branch = torch.zeros(B, 1, 1), torch.randn(B, 1, 1)
    total = torch.zeros(B, 1, 1)
    for _ in range(draws):
        kept = draw_kept_samples(B, 0.4)
        total += scale_residual(x, branch[kept.samples], kept=kept)
    # One sample gives B / C with probability C / B, else 0: the variance is B / C - 1 = 2 / 3.
    error = (total / draws - branch).abs() / branch.abs()
    assert error.max() < 5 * (2 / 3 / draws) ** 0.5


def test_a_seed_repeats_the_draw_and_the_shapes_compile_in_one_graph(device):
    def draw():
        torch.manual_seed(2)
        return draw_kept_samples(32, 0.25)

    assert torch.equal(draw().samples, draw().samples)
    compiled = torch.compile(draw_kept_samples, fullgraph=True, backend="aot_eager")
    samples, slots = compiled(32, 0.25, device)  # traced code asks no ambient device
    assert torch.equal(slots[samples], torch.arange(24, dtype=torch.int32))


def test_decisions_by_rng_have_the_rate_and_are_apart_from_dropped_elements(device):
    rng = draw_rng(device)
    B = 20_000
    keep = drop_path_keep_reference(rng, 0.3, B)
    assert abs(keep.double().mean() - 0.7) < 5 * (0.21 / B) ** 0.5
    # Row b of one-token images has stream b too: its elements must not decide about its sample.
    elements = keep_mask_reference(rng, 0.3, 1, 4, torch.arange(B))[:, 0]
    both = torch.stack((keep.double(), elements[:, 0].double()))
    assert abs(torch.corrcoef(both)[0, 1]) < 5 / B**0.5
