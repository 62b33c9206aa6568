"""Settings at a resume: what changed is recorded, and from which checkpoint a run goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit_fast.train.bad_steps import NonFiniteLoss
from beit_fast.train.config import OptimConfig
from beit_fast.train.log import read_metrics
from beit_fast.train.state import CheckpointError, checkpoint_paths, load_checkpoint, read_manifest
from task_runs import steps_of

PAGE = Path(__file__).parents[2] / "docs" / "pretrain.md"


def newest(output):
    return checkpoint_paths(output)[-1]


def test_a_run_that_diverged_goes_on_with_what_its_error_advises(tmp_path, run_toy, toy_task):
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=3)
    with pytest.raises(NonFiniteLoss) as error:
        run_toy(tmp_path, toy_task(bad_step=6), save_every=3, bad_steps=1)
    advice = {"optim.lr": {"lr": 5e-3}, "optim.warmup_steps": {"warmup_steps": 8}}
    advice["optim.clip_grad"] = {"clip_grad": 0.1}
    for number, (name, change) in enumerate(advice.items()):
        assert f"--{name}" in str(error.value)
        with pytest.raises(NonFiniteLoss):
            run_toy(
                tmp_path, toy_task(bad_step=8 + number), save_every=1, bad_steps=1,
                optim=replace(optim, **change),
            )  # fmt: skip
    _, outcome = run_toy(tmp_path, optim=replace(optim, clip_grad=0.1), bad_steps=1)
    history = read_manifest(outcome.checkpoint)["history"]
    assert [entry["changed"] for entry in history] == [
        {"optim.lr": [1e-2, 5e-3]},
        {"optim.lr": [5e-3, 1e-2], "optim.warmup_steps": [3, 8]},
        {"optim.clip_grad": [3.0, 0.1], "optim.warmup_steps": [8, 3]},
    ]
    assert [entry["step"] for entry in history] == [6, 8, 9]


def test_what_changed_is_said_and_holds(tmp_path, run_toy, capsys):
    with pytest.raises(RuntimeError, match="killed"):
        run_toy(tmp_path, killed_at=6, save_every=3)
    optim = OptimConfig(lr=2e-2, min_lr=2e-2, warmup_steps=0)
    run_toy(tmp_path, optim=optim)
    assert "from step 6 on, optim.lr was 0.01, is 0.02" in capsys.readouterr().out
    rates = {line["step"]: line["lr"] for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert rates[12] == 0.02
    run_toy(tmp_path, optim=replace(optim, lr=3e-2))
    assert "all 12 steps are done, what changed has no effect" in capsys.readouterr().out


def test_another_identity_goes_on_only_when_named(tmp_path, run_toy):
    run_toy(tmp_path, steps=6)
    with pytest.raises(CheckpointError, match=r"run\.seed was 0, is 1") as refused:
        run_toy(tmp_path, seed=1)
    assert "--run.resume_with '[run.seed]'" in str(refused.value)
    run_toy(tmp_path, seed=1, resume_with=("run.seed",))
    assert load_checkpoint(newest(tmp_path)).step == 12
    run_toy(tmp_path, seed=1, resume_with=("run.seed",))  # the same command again
    history = read_manifest(newest(tmp_path))["history"]
    assert history == [{"step": 6, "changed": {"run.seed": [0, 1], "run.steps": [6, 12]}}]


def test_an_average_can_be_begun_when_named(tmp_path, run_toy):
    run_toy(tmp_path, steps=6, ema_decay=None)
    with pytest.raises(CheckpointError, match=r"run\.ema_decay was None, is 0\.9"):
        run_toy(tmp_path)
    _, outcome = run_toy(tmp_path, resume_with=("run.ema_decay",))
    tensors = load_checkpoint(outcome.checkpoint).tensors
    assert not torch.equal(tensors["ema"]["0.weight"], tensors["model"]["0.weight"])
    run_toy(tmp_path, steps=13, ema_decay=0.8)  # another rate goes on


def test_the_images_of_a_step_may_be_split_otherwise_and_are_the_same(tmp_path, run_toy, toy_task):
    """Two micro-batches of four, then one of eight: of the same step, and of the same length."""
    run_toy(tmp_path, steps=None, epochs=4.0, stop_at=3, save_every=3)
    assert read_manifest(newest(tmp_path))["schedule"]["num_steps"] == 10
    task = toy_task(images_per_batch=8)
    _, outcome = run_toy(tmp_path, task, steps=None, epochs=4.0, accumulate=1)
    assert task.fetched[0] == 3
    assert outcome.num_steps == 10  # and not 4 epochs of 2 batches
    (entry,) = read_manifest(outcome.checkpoint)["history"]
    assert entry["changed"].keys() == {"run.images_per_batch", "run.accumulate"}
    with pytest.raises(CheckpointError, match=r"run\.images_per_step was 8, is 4\)"):
        run_toy(tmp_path, accumulate=1, steps=None, epochs=4.0)
    run_toy(tmp_path, accumulate=1, steps=None, epochs=4.0, resume_with=("run.images_per_step",))


def test_a_manifest_without_a_length_goes_on_to_the_end_it_had(tmp_path, run_toy, toy_task):
    run_toy(tmp_path, steps=None, epochs=4.0, stop_at=3, save_every=3)
    path = newest(tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in ("schedule", "history", "sha256"):
        del manifest[entry]
    path.write_text(json.dumps(manifest | {"format": 1}))
    task = toy_task(images_per_batch=8)
    assert run_toy(tmp_path, task, steps=None, epochs=4.0, accumulate=1)[1].num_steps == 10


def test_a_run_goes_back_and_the_same_command_goes_on(tmp_path, run_toy, caplog):
    run_toy(tmp_path, steps=9, save_every=3, keep=9)
    assert steps_of(tmp_path) == [3, 6, 9]
    back = {"resume_from": 3, "save_every": 2, "keep": 9}
    optim = OptimConfig(lr=5e-3, min_lr=1e-3, warmup_steps=3)
    with pytest.raises(RuntimeError, match="killed"):
        run_toy(tmp_path, optim=optim, killed_at=7, **back)
    assert steps_of(tmp_path) == [3, 4, 6]
    abandoned = tmp_path / "checkpoints" / "abandoned"
    assert load_checkpoint(abandoned / "step_00000009").step == 9
    assert [line["step"] for line in read_metrics(abandoned / "metrics.jsonl")] == [4, 8, 9]
    assert "set aside" in caplog.text
    caplog.clear()
    task, _ = run_toy(tmp_path, optim=optim, **back)
    assert task.fetched[0] == 2 * 6  # it goes on, and not back again
    assert "set aside" not in caplog.text
    assert {"step": 3, "changed": {"optim.lr": [1e-2, 5e-3], "run.steps": [9, 12]},
            "back_to": 3} in read_manifest(newest(tmp_path))["history"]  # fmt: skip
    # Other settings are another attempt.
    task, _ = run_toy(tmp_path, optim=replace(optim, lr=4e-3), **back)
    assert task.fetched[0] == 2 * 3


def test_a_step_that_was_not_kept_is_named_with_those_that_were(tmp_path, run_toy):
    run_toy(tmp_path, save_every=3)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5: .* one of 9, 12"):
        run_toy(tmp_path, resume_from=5)
    assert steps_of(tmp_path) == [9, 12]
    with pytest.raises(CheckpointError, match="no checkpoint to go back to"):
        run_toy(tmp_path / "empty", resume_from=5)


def test_weights_of_another_model_are_said_to_be(tmp_path, run_toy, toy_task):
    run_toy(tmp_path, steps=6)
    task = toy_task()
    task.model = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.Linear(9, 1))
    with pytest.raises(CheckpointError, match="not of the model that the settings describe"):
        run_toy(tmp_path, task)
