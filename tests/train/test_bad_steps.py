"""Bad steps: skipped on all ranks, told, kept; so many in a row end the run."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from bad_ranks import RUNS
from beit_fast.train.bad_steps import BadSteps, label_parameters, read_record, record_path
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.log import METRICS, Meter
from beit_fast.train.optim import build_optimizer
from beit_fast.train.sentinel import Sentinel, Statistics, read_note
from beit_fast.train.state import checkpoint_paths, load_checkpoint
from faults import fired
from task_runs import ALONE, SUPPORT, TWO_RANKS, assert_the_same_run, records_of, steps_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """All runs of `bad_ranks.py`, in one start."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [*TWO_RANKS, str(SUPPORT / "bad_ranks.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "said").write_text(done.stderr)
    return folder


def states(output: Path) -> list[list[str]]:
    """Of each rank: before each step, and at the end. Whatever was planted has fired."""
    assert sum(fired(output).values()) == len(RUNS[output.name][0])
    return [json.loads((output / f"rank_{rank}.json").read_text())["states"] for rank in (0, 1)]


def errors(output: Path) -> list[str]:
    return [json.loads((output / f"rank_{rank}.json").read_text())["error"] for rank in (0, 1)]


def unchanged(of_rank: list[str]) -> list[int]:
    """The steps, from 1, that left weights and moments as they were."""
    return [step for step in range(1, len(of_rank)) if of_rank[step - 1] == of_rank[step]]


@pytest.mark.promise("R12")
@pytest.mark.parametrize("place", range(3))
def test_a_step_that_is_bad_on_one_rank_is_skipped_on_both_in_any_micro_batch(two_ranks, place):
    output = two_ranks / f"position_{place}"
    first, second = states(output)
    assert unchanged(first) == unchanged(second) == [4]
    assert first == second
    assert errors(output) == ["", ""]
    lines = {record["step"]: record for record in records_of(output)}
    assert [line.get("skipped") for line in lines.values()] == [None, 1.0, None]
    assert all(math.isfinite(value) for line in lines.values() for value in line.values())
    record = read_record(record_path(output, 4))
    good, bad = record["ranks"]
    assert (record["why"], record["loss"]) == ("loss", bad["loss"])
    assert isinstance(good["loss"], float)
    losses = [batch["loss"] for batch in bad["micro_batches"]]
    assert [isinstance(loss, float) for loss in losses] == [a != place for a in range(3)]
    # Micro-batch a of rank r at step s, from 0, has the images 4 (3 s + a) 2 + 4 r and following.
    begin = 4 * (2 * (3 * 3 + place) + 1)
    batch = bad["micro_batches"][place]
    assert batch["samples"] == list(range(begin, begin + 4))
    assert batch["files"] == [f"image_{index}" for index in batch["samples"]]
    said = (two_ranks / "said").read_text()
    shown = ", ".join(map(str, batch["samples"]))
    assert f"step 4 (its loss was not finite on rank 1, samples {shown}) was skipped" in said


@pytest.mark.promise("R12")
def test_three_in_a_row_end_the_run_on_both_ranks_with_what_was_met(two_ranks):
    output = two_ranks / "three"
    first, second = states(output)
    assert unchanged(first) == [4, 5, 6]
    assert first == second
    assert len(set(errors(output))) == 1
    error = errors(output)[0]
    assert "in 3 steps in a row, first at step 4: no weight was changed from there on" in error
    assert f"The last good checkpoint is {output}/checkpoints/step_00000003. " in error
    assert f"`beit-fast replay {output} 6`" in error
    assert str(record_path(output, 6)) in error
    assert steps_of(output) == [1, 2, 3]
    record = read_record(record_path(output, 6))
    assert record["checkpoint"] == str(checkpoint_paths(output)[-1])
    assert record["environment"]["torch"].startswith("2.")
    assert all(record_path(output, step).exists() for step in (4, 5))


@pytest.mark.promise("R12")
def test_with_one_the_first_ends_the_run(two_ranks):
    first, second = states(two_ranks / "first")
    assert unchanged(first) == unchanged(second) == [4]
    assert all("between steps 4 and 4, first at step 4" in e for e in errors(two_ranks / "first"))


@pytest.mark.promise("R12")
def test_gradients_that_are_bad_under_a_good_loss_are_told_apart(two_ranks):
    output = two_ranks / "gradient"
    first, second = states(output)
    assert unchanged(first) == unchanged(second) == [4]
    record = read_record(record_path(output, 4))
    assert record["why"] == "gradients"
    assert record["gradients_not_finite"] == ["2.weight"]
    assert record["grad_norms"]["2 decay"] == "nan"
    assert record["grad_norms"]["0 decay"] > 0
    said = (two_ranks / "said").read_text()
    assert "its loss was finite on every rank and its gradients were not (of 2.weight)" in said


@pytest.mark.promise("R12")
def test_ranks_that_keep_parts_of_the_weights_skip_alike(two_ranks):
    first, second = states(two_ranks / "fsdp")
    assert unchanged(first) == unchanged(second) == [4, 7]


@pytest.mark.promise("R13")
def test_a_spike_on_one_rank_is_skipped_on_both_and_the_warm_up_does_not_fire(two_ranks):
    output = two_ranks / "spike"
    first, second = states(output)
    assert unchanged(first) == unchanged(second) == [6]
    assert first == second
    record = read_record(record_path(output, 6))
    assert record["why"] == "spike"
    assert record["loss"] > record["mean_before"] + 4 * record["deviation_before"]
    assert record["ranks"][1]["micro_batches"][0]["samples"] == [44, 45, 46, 47]
    assert "most of it on rank 1, samples 44, 45, 46, 47" in (two_ranks / "said").read_text()


@pytest.mark.promise("R12", "R13")
def test_a_run_that_was_stopped_within_a_row_goes_on_as_the_whole_one(two_ranks):
    whole, _ = states(two_ranks / "whole")
    parts, _ = states(two_ranks / "parts")
    assert unchanged(whole) == [4, 5, 8]
    assert parts == whole[5:]
    assert_the_same_run(two_ranks / "whole", two_ranks / "parts")
    (last,) = set(errors(two_ranks / "row"))
    assert "in 3 steps in a row, first at step 4" in last


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def watched(losses, **changes):
    """A sentinel that has seen these losses."""
    module = Many()
    optimizer = build_optimizer([{"params": module.parameters()}], OptimConfig(), CPU)
    sentinel = Sentinel(optimizer, ALONE, RunConfig(output="x", steps=1, **changes))
    lost = []
    for loss in torch.tensor(losses):
        sentinel.watch([loss], loss, torch.ones(()), torch.ones(1))
        lost.append(bool(sentinel.lost))
    return sentinel, lost


@pytest.mark.promise("R13")
def test_spikes_are_looked_for_only_where_they_are_asked_for():
    losses = [1.0, 1.1, 0.9, 1.0, 50.0, 1.0, 1.2]
    assert not any(watched(losses)[1])
    _, lost = watched(losses, spike=3.0, spike_window=4)
    assert lost == [False, False, False, False, True, False, False]
    assert not any(watched(losses, spike=3.0, spike_window=5)[1])  # it warms up
    _, lost = watched([*losses[:4], math.nan, 1.0, 50.0], spike=3.0, spike_window=4)
    assert lost == [False] * 4 + [True, False, True]  # one that is skipped is no part of the mean


@pytest.mark.promise("R12")
def test_what_is_noted_of_a_step_is_read_again():
    module = Many()
    optimizer = build_optimizer([{"params": module.parameters()}], OptimConfig(), CPU)
    sentinel = Sentinel(optimizer, ALONE, RunConfig(output="x", steps=1, bad_steps=1))
    losses = torch.tensor([1.0, 3.0])
    for loss, bad in ((torch.tensor(2.0), False), (torch.tensor(torch.inf), True)):
        values = sentinel.watch(losses, loss, torch.tensor(5.0), torch.tensor([3.0, 4.0])).tolist()
        note = read_note(values, 2)
        assert (note.bad, note.own_loss, note.loss) == (bad, float(loss), float(loss))
        assert (note.grad_norm, note.losses, note.grad_norms) == (5.0, [1.0, 3.0], [3.0, 4.0])
        assert math.isnan(note.mean)


@pytest.mark.promise("R12")
def test_bad_steps_are_told_at_the_latest_after_so_many(tmp_path, run_toy, toy_task, monkeypatch):
    monkeypatch.setattr("beit_fast.train.bad_steps.MOST", 5)
    told = []
    monkeypatch.setattr(BadSteps, "_warn", lambda self, records: told.append(self._checked))
    run_toy(tmp_path, toy_task(bad_step=2), log_every=1000)
    assert told == [5]
    record = read_record(record_path(tmp_path, 3))
    assert record["ranks"][0]["micro_batches"][0]["samples"] == [16, 17, 18, 19]


def test_what_a_resume_needs_is_kept_only_where_there_was_something():
    assert watched([1.0, math.nan, 2.0])[0].state() == {}
    saved, _ = watched([1.0, 2.0, math.nan], spike=3.0, spike_window=3)
    assert saved.state()["sentinel/row"] == 1
    longer, _ = watched([], spike=3.0, spike_window=4)
    longer.load_state(saved.state())
    assert longer.state()["sentinel/good"].tolist()[2:] == [1.0, 2.0]
    shorter, _ = watched([], spike=3.0, spike_window=1)
    shorter.load_state(saved.state())
    assert shorter.state()["sentinel/good"].tolist() == [2.0]
    assert shorter.row == 1


def test_a_meter_leaves_bad_steps_out_and_says_how_many():
    meter, other = Meter(CPU), Meter(CPU)
    for loss in (1.0, math.nan, 3.0):
        meter.add(torch.tensor(float(math.isnan(loss))), loss=torch.tensor(loss))
    state = meter.state(ALONE)
    assert all(value.isfinite().all() for value in state.values())
    assert (int(state["meter_count/loss"]), int(state["meter_skipped"])) == (2, 1)
    other.load_state(state, ALONE)
    for one in (meter, other):
        assert {k: float(v) for k, v in one.means().items()} == {"loss": 2.0, "skipped": 1.0}
        assert one.means() == {}
    meter.add(torch.ones(()), loss=torch.tensor(math.nan))
    assert {k: float(v) for k, v in meter.means().items()} == {"skipped": 1.0}


def test_a_part_of_a_model_is_named_by_its_first_number():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
    model.cls_token = nn.Parameter(torch.ones(1))
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    assert label_parameters(model, groups) == [
        ("blocks.0.weight", "blocks.0 decay"),
        ("head.weight", "head decay"),
        ("cls_token", "cls_token no_decay"),
        ("blocks.0.bias", "blocks.0 no_decay"),
        ("head.bias", "head no_decay"),
    ]


@pytest.mark.promise("R12")
def test_running_statistics_are_as_before_where_the_step_is_lost():
    norm = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).train()
    norm(torch.randn(2, 3, 4, 4))
    statistics, before = Statistics(norm), {k: v.clone() for k, v in norm.state_dict().items()}
    for lost in (1.0, 0.0):
        then = statistics.of_now()
        norm(torch.full((2, 3, 4, 4), torch.nan))
        statistics.restore(then, torch.tensor(lost))
        same = [torch.equal(v, before[k]) for k, v in norm.state_dict().items() if "running" in k]
        assert same == [lost == 1.0] * 4
        assert int(norm[0].num_batches_tracked) == (1 if lost else 2)
    assert Statistics(nn.Linear(2, 2)).of_now() == []


def test_a_run_without_faults_writes_nothing_of_them(tmp_path, run_toy):
    _, outcome = run_toy(tmp_path)
    assert not record_path(tmp_path, 1).parent.exists()
    assert "skipped" not in (tmp_path / METRICS).read_text()
    names = load_checkpoint(outcome.checkpoint).tensors["run"]
    assert not any(name.startswith(("sentinel", "meter_skipped")) for name in names)


@pytest.mark.promise("R12")
def test_a_checkpoint_that_falls_due_in_a_row_is_written_after_it(tmp_path, run_toy, toy_task):
    run_toy(tmp_path, toy_task(bad_step=6), save_every=7, log_every=4)
    assert steps_of(tmp_path) == [8, 12]


def test_what_cannot_be_written_of_a_bad_step_ends_nothing(tmp_path, run_toy, toy_task, caplog):
    (tmp_path / "bad_steps").write_text("a file in its place")
    run_toy(tmp_path, toy_task(bad_step=6))
    assert "bad_steps failed, and training goes on" in caplog.text
    assert "step 7 (its loss was not finite on rank 0, samples" in caplog.text


def test_a_step_that_is_skipped_leaves_the_average_alone(tmp_path, run_toy, toy_task):
    _, outcome = run_toy(tmp_path, toy_task(bad_step=6))
    assert all(v.isfinite().all() for v in outcome.model.state_dict().values())


def test_a_record_that_is_damaged_is_refused_by_name(tmp_path):
    path = tmp_path / "step_00000001.json"
    for text in ("[]", '{"format": 99}', "{", '{"format": NaN}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"step_00000001\.json is of another version, or"):
            read_record(path)
