"""However the images of a step are split over ranks and micro-batches, the run is the same one."""

import pickle
import subprocess
from pathlib import Path

import pytest
import torch

import split_ranks
from beit_fast.train.state import CheckpointError, checkpoint_paths, load_checkpoint, read_manifest
from split_ranks import run_split
from task_runs import ALONE, TWO_RANKS, assert_the_same_run, records_of

# Images of a micro-batch, micro-batches of a rank, ranks: four images a step.
ONE, HALVES, QUARTERS, RANKS, BOTH = (4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)


@pytest.fixture
def split_config(pretrain_config, tmp_path):
    """`split_config(output, split, **fields of RunConfig)`: with drop path, and masks of 10 to 18
    patches."""

    def make(output: str, split: tuple[int, int, int], **run):
        return pretrain_config(
            data={"batch_size": split[0]},
            masking={"strategy": "block_paper", "min_block": 8},
            run={"output": str(tmp_path / output), "log_every": 1, "accumulate": split[1]} | run,
        )

    return make


@pytest.fixture
def on_two_ranks(tmp_path):
    """`on_two_ranks(name=(configuration, options of run_split))`: what each rank saw; one start."""

    def start(**runs) -> dict[str, list[dict]]:
        listed = [(name, *run) for name, run in runs.items()]
        (tmp_path / "runs.pkl").write_bytes(pickle.dumps(listed))
        command = [*TWO_RANKS, split_ranks.__file__, str(tmp_path / "runs.pkl"), str(tmp_path)]
        done = subprocess.run(command, timeout=300, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return {n: [torch.load(tmp_path / f"{n}_{rank}.pt") for rank in (0, 1)] for n in runs}

    return start


def in_steps(ranks: list[dict], name: str, split: tuple[int, int, int]) -> list[torch.Tensor]:
    """What the ranks saw, put together to steps: samples on the last axis."""
    of_ranks = zip(*[rank[name] for rank in ranks], strict=True)
    micro_batches = [part for parts in of_ranks for part in parts]
    size = split[1] * split[2]
    assert len(micro_batches) % size == 0
    starts = range(0, len(micro_batches), size)
    return [torch.cat(micro_batches[start : start + size], dim=-1) for start in starts]


def assert_the_same_numbers(ours: Path, theirs: Path) -> None:
    """But for rounding where something is summed otherwise; what is counted exactly."""
    for our, their in zip(records_of(ours), records_of(theirs), strict=True):
        assert our.keys() == their.keys()
        for name, value in their.items():
            assert our[name] == pytest.approx(value, rel=1e-5 if name == "grad_norm" else 1e-6)
    one, other = (load_checkpoint(checkpoint_paths(output)[-1]) for output in (ours, theirs))
    counted = "counter/token_counts"
    assert torch.equal(one.tensors["run"][counted], other.tensors["run"][counted])
    # AdamW divides rounding differences by small second moments.
    for name, value in one.tensors["model"].items():
        torch.testing.assert_close(other.tensors["model"][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.promise("R1", "R2")
def test_a_step_is_the_same_however_it_is_split(split_config, on_two_ranks, tmp_path):
    whole = run_split(split_config("one", ONE), ALONE)
    quarters = run_split(split_config("quarters", QUARTERS), ALONE)
    run_split(split_config("half_bare", HALVES), ALONE, bare=(1,))
    run_split(split_config("began_alone", ONE), ALONE, stop=3)
    windows, stops = {"log_every": 4}, {"stop": 3}  # a stop inside a window of the log
    seen = on_two_ranks(
        ranks=(split_config("ranks", RANKS), {}),
        both=(split_config("both", BOTH), {}),
        fsdp=(split_config("fsdp", RANKS, parallel="fsdp"), {}),
        means=(split_config("means", RANKS, loss_mean="rank"), {}),
        one_bare=(split_config("one_bare", RANKS), {"bare": (1,)}),
        all_bare=(split_config("all_bare", RANKS), {"bare": (0, 1)}),
        ended=(split_config("began_alone", BOTH), {}),
        began=(split_config("began_on_two", RANKS, **windows), stops),
        parts=(split_config("parts", RANKS, **windows), stops),
        parts_ended=(split_config("parts", RANKS, **windows), {}),
        undisturbed=(split_config("undisturbed", RANKS, **windows), {}),
    )
    for name in ("sample_index", "keep"):
        wholes = in_steps([whole], name, ONE)
        assert len(wholes) == 6
        for ranks, split in (
            ([quarters], QUARTERS),
            (seen["ranks"], RANKS),
            (seen["both"], BOTH),
        ):
            for ours, theirs in zip(in_steps(ranks, name, split), wholes, strict=True):
                assert torch.equal(ours, theirs)
        for ours, theirs in zip(in_steps(seen["ended"], name, BOTH), wholes[3:], strict=True):
            assert torch.equal(ours, theirs)
    for output in ("quarters", "ranks", "both", "fsdp", "began_alone"):
        assert_the_same_numbers(tmp_path / output, tmp_path / "one")

    # The mean of the ranks' means is another number: this test can fail.
    means, of_all = (records_of(tmp_path / output)[0] for output in ("means", "one"))
    assert means["loss"] != pytest.approx(of_all["loss"], rel=1e-5)

    # Nothing hidden on one rank, or on none.
    assert_the_same_numbers(tmp_path / "one_bare", tmp_path / "half_bare")
    for record in records_of(tmp_path / "all_bare"):
        assert record["loss"] == record["grad_norm"] == record["accuracy"] == 0

    # Resumed on as many ranks to the last bit, metrics too; on one as from the start.
    assert_the_same_run(tmp_path / "parts", tmp_path / "undisturbed")
    run_split(split_config("began_on_two", ONE, **windows), ALONE)
    assert_the_same_numbers(tmp_path / "began_on_two", tmp_path / "undisturbed")
    (entry,) = read_manifest(checkpoint_paths(tmp_path / "began_on_two")[-1])["history"]
    assert entry["changed"].keys() == {"data.batch_size", "run.images_per_batch", "run.world_size"}


@pytest.mark.promise("R2")
def test_another_number_of_images_a_step_is_refused_with_what_keeps_it(split_config):
    run_split(split_config("run", ONE), ALONE, stop=2)
    with pytest.raises(CheckpointError, match=r"run\.images_per_step was 4, is 2") as refused:
        run_split(split_config("run", (2, 1, 1)), ALONE)
    assert "a step are ranks x --data.batch_size x --run.accumulate" in str(refused.value)
    run_split(split_config("run", HALVES), ALONE)
