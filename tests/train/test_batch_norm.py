"""Batch norm over ranks: the run of one process with all the images, and the same buffers."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import normed_ranks
from beit_fast.train.batch_norm import GatheredBatchNorm, _merged, synchronize_batch_norm
from beit_fast.train.state import checkpoint_paths, load_checkpoint
from beit_fast.train.world import World
from normed_ranks import train_normed
from task_runs import ALONE, TWO_RANKS, records_of

TWO = World(0, 2, torch.device("cpu"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    script = Path(normed_ranks.__file__)
    done = subprocess.run(
        [*TWO_RANKS, str(script), str(output)], timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize(("name", "accumulate"), [("whole", 1), ("accumulated", 2)])
def test_two_ranks_learn_what_one_process_with_both_batches_does(two, tmp_path, name, accumulate):
    train_normed(tmp_path, ALONE, 4, accumulate)
    ours, theirs = records_of(two / name), records_of(tmp_path)
    assert len(ours) == 12
    assert len({record["loss"] for record in ours}) == 12
    for record, other in zip(ours, theirs, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    ours, theirs = (
        load_checkpoint(checkpoint_paths(p)[-1]).tensors for p in (two / name, tmp_path)
    )
    for part in ("model", "ema"):
        assert ours[part].keys() == theirs[part].keys()  # no wrapper shows in a name
        assert ours[part]["1.num_batches_tracked"] == 12 * accumulate
        for key, value in theirs[part].items():
            torch.testing.assert_close(ours[part][key], value, rtol=1e-4, atol=1e-5)


def test_ranks_have_torchs_buffers_and_both_the_same_to_the_last_bit(two):
    """Also of one pixel on each rank, which a rank alone could not normalise."""
    ranks = [torch.load(two / f"norm_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(ranks[0][name], ranks[1][name]), name
    plain = nn.BatchNorm2d(4)
    plain.weight.data.copy_(ranks[0]["weight"])
    pixels = torch.tensor([1.0, -2.0, 30.0, 0.5]).view(1, 4, 1, 1) * torch.tensor([1, 2]).view(
        2, 1, 1, 1
    )
    wanted, in_bf16 = plain(pixels), plain(pixels.bfloat16())
    for rank, ours in enumerate(ranks):
        torch.testing.assert_close(ours["one_pixel"], wanted[rank : rank + 1])
        torch.testing.assert_close(ours["in_bf16"], in_bf16[rank : rank + 1])
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(ours[name], value, msg=name)
    plain.eval()
    for rank, ours in enumerate(ranks):  # nothing is exchanged: by the buffers
        torch.testing.assert_close(ours["evaluated"], plain(pixels[rank : rank + 1]))


def test_merged_moments_are_those_of_all_values():
    torch.manual_seed(0)
    parts = [torch.randn(n, 5, dtype=torch.float64) * n + n for n in (2, 1, 7)]
    moments = [
        torch.stack([torch.full((5,), len(p)), p.mean(0), p.var(0, correction=0) * len(p)])
        for p in parts
    ]
    count, mean, squares = _merged(torch.stack(moments))
    whole = torch.cat(parts)
    assert count.unique().tolist() == [10]
    torch.testing.assert_close(mean, whole.mean(0))
    torch.testing.assert_close(squares / 9, whole.var(0))


def test_one_process_keeps_its_batch_norm_and_several_the_tensors_and_names():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sequential(nn.BatchNorm2d(3, eps=1e-3)))
    norm, names = model[1][0], list(model.state_dict())
    assert synchronize_batch_norm(model, ALONE)[1][0] is norm
    on_gpus = synchronize_batch_norm(
        nn.Sequential(nn.BatchNorm2d(3)), World(0, 2, torch.device("cuda", 0))
    )
    assert type(on_gpus[0]) is nn.SyncBatchNorm
    ours = synchronize_batch_norm(model.eval(), TWO)[1][0]
    assert type(ours) is GatheredBatchNorm
    assert (ours.eps, ours.training) == (1e-3, False)
    assert ours.weight is norm.weight
    assert ours.running_var is norm.running_var
    assert list(model.state_dict()) == names
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(ours(images), norm(images))
