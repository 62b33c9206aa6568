"""Two ranks over gloo: the same run as one, and faults of one rank are met by both."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.parallel import check_parallel, forward_exchanges, parallel
from beit_fast.train.state import checkpoint_paths, load_checkpoint, load_newest, read_manifest
from beit_fast.train.world import World, open_world
from faults import fired
from task_runs import ALONE, SUPPORT, TWO_RANKS

TWO = World(0, 2, torch.device("cpu"))


def two_ranks(output: Path, fault: str) -> tuple[dict, dict, list[str]]:
    output.mkdir(exist_ok=True)
    script = SUPPORT / "two_ranks.py"
    subprocess.run(
        [*TWO_RANKS, str(script), str(output), fault],
        check=True,
        timeout=120,
        capture_output=True,
    )
    models = [torch.load(output / f"model_{r}.pt", weights_only=True) for r in (0, 1)]
    errors = [p.read_text() for p in sorted(output.glob("error_*.txt"))]
    return *models, errors


def test_two_ranks_learn_what_one_learns_from_twice_the_micro_batches(tmp_path, run_toy, toy_task):
    first, second, errors = two_ranks(tmp_path / "two", "none")
    assert not errors
    alone, _ = run_toy(tmp_path / "one", toy_task(dropout=0.0), accumulate=2)
    for name, value in alone.model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


def test_what_two_ranks_began_one_ends_and_the_other_way_round(tmp_path, run_toy, toy_task):
    whole, _ = run_toy(tmp_path / "whole", toy_task(dropout=0.0), accumulate=2)
    two_ranks(tmp_path / "run", "term")
    task, outcome = run_toy(tmp_path / "run", toy_task(dropout=0.0), accumulate=2)
    assert task.fetched[0] == 10  # five steps of two micro-batches, of a rank each
    (entry,) = read_manifest(outcome.checkpoint)["history"]
    changed = {"run.accumulate": [1, 2], "run.world_size": [2, 1]}
    assert entry == {"step": 5, "changed": changed}
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(task.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)

    run_toy(tmp_path / "back", toy_task(dropout=0.0), accumulate=2, save_every=3, keep=9)
    first, second, errors = two_ranks(tmp_path / "back", "back")
    assert not errors
    assert (tmp_path / "back" / "checkpoints" / "abandoned" / "step_00000012").exists()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


def test_an_evaluation_that_fails_on_one_rank_ends_neither(tmp_path):
    first, second, errors = two_ranks(tmp_path / "goes_on", "evaluation")
    assert not errors
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_checkpoint(checkpoint_paths(tmp_path / "goes_on")[-1]).step == 12
    *_, errors = two_ranks(tmp_path / "strict", "strict")
    assert "on another rank" in errors[0]
    assert "division by zero" in errors[1]
    assert load_checkpoint(checkpoint_paths(tmp_path / "strict")[-1]).step == 5


@pytest.mark.promise("R7", "R8")
def test_one_rank_saves_the_other_goes_on_and_saves_that_fail_beyond_what_is_borne_end_both(
    tmp_path,
):
    first, second, errors = two_ranks(tmp_path / "two", "disk")
    assert (tmp_path / "two" / "rank_1_goes_on").exists()  # before the first was on the disk
    assert "No space left" in errors[0]
    assert errors[1] == "a checkpoint could not be written; the main rank says why"
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_newest(tmp_path / "two").step == 3
    assert fired(tmp_path / "two") == {"0:6:full_disk": 1, "0:9:full_disk": 1}


def test_cuda_is_refused_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"pass --run\.device cpu$"), open_world("cuda"):
        pass


def test_more_threads_than_cores_are_refused_and_as_many_are_not():
    cores = os.cpu_count()
    with (
        pytest.raises(ValueError, match=rf"this machine has {cores} cores: pass {cores} or less"),
        open_world("cpu", cores + 1),
    ):
        pass
    with open_world("cpu", cores):
        assert torch.get_num_threads() == cores


def test_the_flag_of_the_device_is_named_as_the_verb_has_it():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"pass --device cpu$"), open_world("cuda", named="device"):
        pass


def check(world=TWO, backend="torch", **run):
    check_parallel(RunConfig(output="x", steps=1, **run), OptimConfig(backend=backend), world)


def test_graphs_of_the_compiler_are_refused_where_gradients_are_exchanged():
    options = {"compile": "reduce-overhead"}
    with pytest.raises(ValueError, match=r"2 processes .*: pass --run\.compile default$"):
        check(**options)
    check(ALONE, **options)
    check(compile="default")


def test_apex_is_refused_for_weights_in_parts():
    options = {"parallel": "fsdp", "backend": "apex"}
    with pytest.raises(ValueError, match=r"backend torch, or --run\.parallel ddp$"):
        check(**options)
    check(ALONE, **options)
    check(**options | {"backend": "torch"})
    check(**options | {"parallel": "ddp"})


def test_what_ranks_cannot_do_together_is_refused_before_the_first_step(tmp_path, run_toy):
    with pytest.raises(ValueError, match="apex"):
        run_toy(tmp_path, world=TWO, parallel="fsdp", optim=OptimConfig(backend="apex"))


def test_one_process_shares_with_nobody(tmp_path, run_toy):
    """Whatever the settings say, it trains the plain module, to the last bit."""
    run_toy(tmp_path / "plain")
    task, outcome = run_toy(tmp_path / "alone", parallel="fsdp", gradient_dtype="bf16")
    assert outcome.trained is task.model
    plain, _ = run_toy(tmp_path / "plain")
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, task.model.state_dict()[name])
    module = nn.Linear(2, 2)
    ways = parallel(RunConfig(output="x", steps=1, parallel="fsdp"), ALONE, module)
    assert ways.wrap(module) is module


def test_ranks_wait_for_each_other_in_the_forward_pass_where_batch_norm_is_of_all():
    assert forward_exchanges(nn.Sequential(nn.SyncBatchNorm(2)))
    assert not forward_exchanges(nn.Sequential(nn.BatchNorm2d(2)))
