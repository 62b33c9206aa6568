"""The loop: exact resume, stops, bad losses, no host sync on a silent step."""

import json
import os
import signal
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.train.bad_steps import NonFiniteLoss
from beit_fast.train.log import read_metrics
from beit_fast.train.seeds import step_seed
from beit_fast.train.state import CheckpointError, checkpoint_paths, load_checkpoint
from beit_fast.train.stop import Interrupted
from task_runs import assert_the_same_run, records_of


@pytest.fixture
def undisturbed(tmp_path, run_toy):
    run_toy(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.promise("R1", "R10", "R11")
@pytest.mark.parametrize("stop_after", [1, 4, 5, 6, 11])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_and_resumed_run_is_bitwise_the_undisturbed_one(
    undisturbed, tmp_path, run_toy, toy_task, stop_after, signum
):
    """One signal comes in the last micro-batch of a step, the other one between its two."""
    task = toy_task()
    micro_batches = iter(range(1, 100))
    at = 2 * stop_after - (signum == signal.SIGINT)

    def on_step(step):
        if next(micro_batches) == at:
            os.kill(os.getpid(), signum)

    task.on_step = on_step
    with pytest.raises(Interrupted) as stop:
        run_toy(tmp_path / "parts", task)
    assert stop.value.exit_code == 128 + signum
    assert load_checkpoint(checkpoint_paths(tmp_path / "parts")[-1]).step == stop_after
    resumed, _ = run_toy(tmp_path / "parts")
    assert resumed.fetched[0] == stop_after * 2  # two micro-batches a step
    assert_the_same_run(undisturbed, tmp_path / "parts")


def test_a_finished_run_trains_nothing_when_started_again(undisturbed, run_toy):
    before = records_of(undisturbed)
    task, outcome = run_toy(undisturbed)
    assert task.fetched == []
    assert outcome.num_steps == 12
    assert records_of(undisturbed) == before


@pytest.mark.promise("R10")
def test_signal_handlers_are_put_back(tmp_path, run_toy):
    before = signal.getsignal(signal.SIGTERM)
    run_toy(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_non_finite_loss_stops_the_run_names_the_steps_and_spares_the_weights(
    tmp_path, run_toy, toy_task
):
    with pytest.raises(NonFiniteLoss, match=r"between steps 7 and 8, first at step 7") as error:
        run_toy(tmp_path, toy_task(bad_step=6), save_every=3, bad_steps=1)
    kept = checkpoint_paths(tmp_path)
    assert [p.name for p in kept] == ["step_00000003", "step_00000006"]
    assert str(kept[-1]) in str(error.value)
    assert all(v.isfinite().all() for v in load_checkpoint(kept[-1]).tensors["model"].values())


@pytest.mark.promise("R12")
def test_a_run_that_spikes_end_says_how_to_let_them_pass(tmp_path, run_toy):
    with pytest.raises(NonFiniteLoss, match=r"loss is a spike between steps") as error:
        run_toy(tmp_path, bad_steps=1, spike=1.0, spike_window=1)  # whatever is above the last
    assert "or let it pass (--run.spike larger or null), and it goes on" in str(error.value)
    _, outcome = run_toy(tmp_path, bad_steps=1, spike=None, spike_window=1)
    assert outcome.num_steps == 12


def test_nothing_is_learnt_from_a_bad_step_on(tmp_path, run_toy, toy_task):
    good, bad = toy_task(), toy_task(bad_step=6)
    states = {}
    for name, task in (("good", good), ("bad", bad)):
        states[name] = {}

        def keep(step, task=task, states=states[name]):
            states.setdefault(step, {k: v.clone() for k, v in task.model.state_dict().items()})

        task.on_step = keep
    run_toy(tmp_path / "good", good)
    with pytest.raises(NonFiniteLoss):
        run_toy(tmp_path / "bad", bad, bad_steps=1)
    for name, value in states["good"][6].items():
        assert torch.equal(states["bad"][7][name], value)


class CountSyncs(TorchDispatchMode):
    """Counts reads of device values by the host, which `.item()`, `float()` and `if` all are."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_that_prints_nothing_does_not_sync(tmp_path, run_toy, toy_task):
    syncs = {}
    with CountSyncs() as mode:
        task = toy_task()
        task.on_step = lambda step: syncs.setdefault(step, mode.count)
        run_toy(tmp_path, task)
    per_step = {step: syncs[step + 1] - syncs[step] for step in range(11)}
    assert per_step[3] > 0  # the log line after the fourth step reads its numbers
    assert all(per_step[step] == 0 for step in range(1, 11) if (step + 1) % 4)


def test_resume_never_and_must_do_as_they_say(undisturbed, tmp_path, run_toy):
    with pytest.raises(CheckpointError, match=r"run\.resume is never"):
        run_toy(undisturbed, resume="never")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run_toy(tmp_path / "empty", resume="must")


def test_metrics_past_the_checkpoint_are_cut_at_a_resume(undisturbed, run_toy):
    path = undisturbed / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": 99, "loss": 1.0}) + "\n" + '{"step": 100, "lo')
    run_toy(undisturbed)
    assert [line["step"] for line in read_metrics(path)] == [4, 8, 12]


def test_averaged_weights_are_what_the_picture_and_the_outcome_get(tmp_path, run_toy):
    task, outcome = run_toy(tmp_path)
    assert outcome.model is not task.model
    ema = load_checkpoint(outcome.checkpoint).tensors["ema"]
    assert torch.equal(ema["0.weight"], outcome.model[0].weight)
    assert outcome.picture.read_bytes() == b"png"


@pytest.mark.promise("R11")
def test_a_second_interrupt_ends_the_run_at_once(tmp_path, run_toy, toy_task):
    task = toy_task()
    task.on_step = lambda step: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, task)


@pytest.mark.promise("R23")
def test_two_runs_do_not_share_a_folder(tmp_path, run_toy, toy_task):
    task = toy_task()
    errors = []

    def second_run(step):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}") as error:
            run_toy(tmp_path)
        errors.append(error)

    task.on_step = second_run
    run_toy(tmp_path, task, steps=4)
    assert errors


def test_step_seeds_differ_by_every_coordinate():
    seeds = {step_seed(a, b, c) for a in range(3) for b in range(9) for c in range(3)}
    assert len(seeds) == 3 * 9 * 3


def test_evaluation_falls_due_by_epochs_and_changes_no_weight(undisturbed, tmp_path, run_toy):
    _, outcome = run_toy(tmp_path / "evaluated", evaluate_every=1.2)
    steps = {}
    for line in read_metrics(tmp_path / "evaluated" / "metrics.jsonl"):
        if "test_weight" in line:
            assert line["test_weight"] != line["test_ema_weight"]
            steps[line["step"]] = line["epoch"]
    # 8 of 20 images a step: 1.2, 2.4 and 3.6 epochs; the end, at 4.8, has its own evaluation.
    assert steps == {3: pytest.approx(1.2), 6: pytest.approx(2.4), 9: pytest.approx(3.6)}
    expected = load_checkpoint(checkpoint_paths(undisturbed)[-1]).tensors["model"]
    saved = load_checkpoint(outcome.checkpoint).tensors["model"]
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


def test_evaluation_takes_nothing_from_the_speed_of_training(tmp_path, run_toy, toy_task):
    task = toy_task()
    task.evaluate = lambda model: time.sleep(1) or {}
    run_toy(tmp_path, task, evaluate_every=4.0, log_every=12)
    # Ten steps of eight images and two seconds of evaluation: 40 images a second, would it count.
    (speed, _) = (line["images_per_second"] for line in read_metrics(tmp_path / "metrics.jsonl"))
    assert speed > 80
