"""Drop path by sample: its numbers, and that they follow a sample to whatever rank."""

from dataclasses import replace

import pytest
import torch

from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig
from beit_fast.tasks.drop_path import DropPathDraws
from beit_fast.train.config import RunConfig
from beit_fast.train.world import World

CONFIG = BeitConfig(
    img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, drop_path_rate=0.5
)
MODEL = Beit(CONFIG)


def draws(batch_size=4, accumulate=1, rank=0, size=1, seed=0, model=MODEL):
    run = RunConfig(output="x", steps=1, seed=seed, accumulate=accumulate)
    return DropPathDraws(model, run, batch_size, World(rank, size, torch.device("cpu")))


def keeps(count: int, start: int = 0, **options) -> list[torch.Tensor]:
    batches = iter([{"x": torch.zeros(1)} for _ in range(count)])
    return [batch["keep"] for batch in draws(**options).added_to(batches, start)]


def test_a_sample_skips_the_same_branches_on_whatever_rank():
    whole = keeps(3)
    of_ranks = [keeps(3, batch_size=2, rank=rank, size=2) for rank in (0, 1)]
    quarters = keeps(12, batch_size=1, accumulate=4)
    both = [keeps(6, batch_size=1, accumulate=2, rank=rank, size=2) for rank in (0, 1)]
    for step in range(3):
        assert torch.equal(whole[step], torch.cat([rank[step] for rank in of_ranks], dim=1))
        assert torch.equal(whole[step], torch.cat(quarters[4 * step : 4 * step + 4], dim=1))
        parts = [both[rank][2 * step + micro] for micro in (0, 1) for rank in (0, 1)]
        assert torch.equal(whole[step], torch.cat(parts, dim=1))


def test_a_run_that_starts_later_has_the_numbers_of_one_that_did_not():
    (later,) = keeps(1, start=5, batch_size=2, accumulate=2)
    assert torch.equal(later, keeps(6, batch_size=2, accumulate=2)[5])


def test_factors_are_those_of_the_blocks_rates():
    (keep,) = keeps(1, batch_size=20_000)
    assert keep.dtype == torch.float32
    assert keep.shape == (6, 20_000)
    assert keep.is_contiguous()
    for branch, rate in enumerate((0.0, 0.0, 0.25, 0.25, 0.5, 0.5)):
        kept = torch.tensor(1 / (1 - rate))
        values = {0.0, float(kept)} if rate else {1.0}
        assert set(keep[branch].tolist()) == values
        assert keep[branch].mean().item() == pytest.approx(1, abs=0.03)
    correlation = torch.corrcoef(keep[2:])
    assert (correlation - torch.eye(4)).abs().max() < 0.03


def test_steps_and_seeds_draw_apart():
    first, second = keeps(2, batch_size=64)
    (other,) = keeps(1, batch_size=64, seed=1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("changes", [{"drop_path_rate": 0.0}, {"drop_path_compact": True}])
def test_nothing_is_added_where_blocks_draw_nothing_or_otherwise(changes):
    added = draws(model=Beit(replace(CONFIG, **changes))).added_to(iter([{"x": 1}]), 0)
    assert [*added] == [{"x": 1}]


@pytest.mark.parametrize("changes", [{}, {"drop_path_rate": 0.0}])
def test_closing_it_closes_what_it_adds_to(changes):
    closed = []

    def endless():
        try:
            while True:
                yield {}
        finally:
            closed.append(True)

    added = draws(model=Beit(replace(CONFIG, **changes))).added_to(endless(), 0)
    next(added)
    added.close()
    assert closed
