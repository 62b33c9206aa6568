"""What micro-batches count for in their step."""

import pytest
import torch

from beit_fast.train.config import RunConfig
from beit_fast.train.shares import shares_of
from beit_fast.train.world import World
from task_runs import ALONE, RefuseSyncs


def batches(*counts: int) -> list[dict[str, torch.Tensor]]:
    return [{"n": torch.tensor(float(count))} for count in counts]


def shares(world: World = ALONE, **run):
    run = RunConfig(output="x", steps=1, **run)
    return shares_of(lambda batch: batch["n"], run, world)


def test_one_micro_batch_of_one_process_counts_for_exactly_one():
    for count in (1, 3, 75, 9_599, 401_408):
        (share,) = shares()(batches(count))
        assert float(share) == 1.0


def test_a_mean_of_means_with_these_shares_is_the_mean_of_all():
    values = torch.rand(10, dtype=torch.float64)
    parts = values.split([5, 1, 4])
    given = shares()(batches(*map(len, parts)))
    total = sum(share * part.mean() for share, part in zip(given, parts, strict=True))
    torch.testing.assert_close(total, values.mean(), rtol=1e-6, atol=0)


def test_a_micro_batch_of_nothing_counts_for_nothing():
    assert [float(share) for share in shares()(batches(0, 6))] == [0.0, 1.0]
    assert [float(share) for share in shares()(batches(0, 0))] == [0.0, 0.0]


def test_the_mean_of_means_counts_each_micro_batch_as_much():
    assert shares(loss_mean="rank")(batches(1, 3)) == [0.5, 0.5]
    equal = shares_of(lambda batch: None, RunConfig(output="x", steps=1), ALONE)
    assert equal(batches(1, 3)) == [0.5, 0.5]


def test_shares_of_several_ranks_average_to_one(monkeypatch):
    monkeypatch.setattr(World, "sum", lambda self, values: values + 6)  # what the others have
    ours = shares(World(0, 3, torch.device("cpu")))(batches(1, 2))
    assert [float(share) for share in ours] == pytest.approx([3 * 1 / 9, 3 * 2 / 9])


def test_no_share_waits_for_the_device():
    with RefuseSyncs():
        shares()(batches(2, 5))
