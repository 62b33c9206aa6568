"""Evaluation, pictures and logs come after the save, and take nothing down."""

import contextlib
import os
import signal
import sys

import pytest

from beit_fast.train.log import Log, read_metrics
from beit_fast.train.state import load_checkpoint
from beit_fast.train.stop import Interrupted, heed_stop, stop_signals
from task_runs import steps_of


def fails(*_):
    raise OSError(5, "Input/output error", "test/003.jpg")


def test_an_evaluation_that_fails_is_told_and_training_goes_on(tmp_path, run_toy, toy_task, caplog):
    task = toy_task()
    task.evaluate = fails
    _, outcome = run_toy(tmp_path / "run", task, evaluate_every=1.2)
    assert len(outcome.failed) == 3
    assert "evaluation after step 3 failed, and training goes on: OSError" in caplog.text
    assert "test/003.jpg" in outcome.failed[0]
    _, whole = run_toy(tmp_path / "whole")
    ours, theirs = (load_checkpoint(o.checkpoint).tensors["model"] for o in (outcome, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_strict_run_ends_with_it_and_what_was_trained_is_saved(tmp_path, run_toy, toy_task):
    task = toy_task()
    task.evaluate = fails
    with pytest.raises(OSError, match="Input/output"):
        run_toy(tmp_path, task, evaluate_every=1.2, strict=True)
    assert steps_of(tmp_path) == [3]
    # On going on, what was not evaluated is.
    run_toy(tmp_path, evaluate_every=1.2, strict=True)
    evaluated = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if "test_weight" in r]
    assert evaluated == [3, 6, 9]


@pytest.mark.promise("R7")
def test_pictures_and_logs_that_fail_are_told(tmp_path, run_toy, toy_task, monkeypatch, caplog):
    task = toy_task()
    task.picture = fails
    monkeypatch.setattr(Log, "line", fails)
    monkeypatch.setattr(Log, "close", fails)
    _, outcome = run_toy(tmp_path, task, picture_every=5)
    assert load_checkpoint(outcome.checkpoint).step == 12
    kinds = [failed.partition(" (")[0].split("/")[-1] for failed in outcome.failed]
    assert kinds == [
        *("the log", "picture_00000005.png", "the log", "picture_00000010.png", "the log"),
        *("picture.png", "closing the log"),
    ]
    assert caplog.text.count("training goes on") == 7


@pytest.mark.promise("R7")
def test_a_reader_of_the_log_that_goes_away_is_told_once_and_training_goes_on(
    tmp_path, run_toy, monkeypatch, caplog
):
    reading, writing = os.pipe()
    os.close(reading)
    nobody = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stdout", nobody)
    _, outcome = run_toy(tmp_path)
    monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
        nobody.close()
    assert load_checkpoint(outcome.checkpoint).step == 12
    (failed,) = outcome.failed
    assert failed == "the log (BrokenPipeError: [Errno 32] Broken pipe: 'standard output')"
    assert caplog.text.count("the log failed, and training goes on") == 1
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 12


@pytest.mark.promise("R10")
def test_a_stop_during_evaluation_is_heeded_there_and_the_step_is_saved(
    tmp_path, run_toy, toy_task
):
    done = []

    def evaluate(model):
        os.kill(os.getpid(), signal.SIGTERM)
        for number in range(100):
            heed_stop("while evaluating")
            done.append(number)

    task = toy_task()
    task.evaluate = evaluate
    with pytest.raises(
        Interrupted, match="SIGTERM evaluating after step 3; the checkpoint"
    ) as stop:
        run_toy(tmp_path / "parts", task, evaluate_every=1.2)
    assert stop.value.exit_code == 143
    assert not done
    assert steps_of(tmp_path / "parts") == [3]
    run_toy(tmp_path / "parts", evaluate_every=1.2)
    run_toy(tmp_path / "whole", evaluate_every=1.2)
    parts, whole = (
        [{k: v for k, v in r.items() if k != "images_per_second"} for r in read_metrics(path)]
        for path in (tmp_path / "parts/metrics.jsonl", tmp_path / "whole/metrics.jsonl")
    )
    assert parts == whole
    assert sum("test_weight" in record for record in parts) == 3


@pytest.mark.promise("R10", "R11")
def test_a_stop_while_the_last_picture_is_drawn_is_heard(tmp_path, run_toy, toy_task):
    task = toy_task()
    task.picture = lambda model, path: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGINT after step 12") as stop:
        run_toy(tmp_path, task)
    assert stop.value.exit_code == 130
    assert steps_of(tmp_path) == [12]


def test_a_block_within_a_block_has_the_same_flag():
    with stop_signals() as outer:
        with stop_signals() as inner:
            assert inner is outer
        os.kill(os.getpid(), signal.SIGTERM)  # between two stages
        with stop_signals() as later:
            assert later.received == signal.SIGTERM
            with pytest.raises(Interrupted):
                heed_stop("here")
    heed_stop("outside of any block nothing is heeded")
