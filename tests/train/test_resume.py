"""Settings at a resume: habits are free, advised ones recorded, the rest needs a word."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from beit_fast.recipes import FINETUNE, PRETRAIN, SEGMENT, TOKENIZER
from beit_fast.tasks.sources import task_settings
from beit_fast.train import resume
from beit_fast.train.agreement import flat
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.log import read_metrics
from beit_fast.train.resume import check_settings
from beit_fast.train.state import CheckpointError, checkpoint_paths, load_checkpoint, read_manifest
from beit_fast.train.step import NonFiniteLoss
from task_runs import steps_of

PAGE = Path(__file__).parents[2] / "docs" / "pretrain.md"


def flat_names(recipes):
    """All settings that a manifest of these recipes holds, habits too."""
    names = set()
    for recipe in recipes.values():
        config = recipe()
        settings = task_settings(config)
        names |= {f"optim.{f.name}" for f in fields(OptimConfig)}
        names |= {f"run.{f.name}" for f in fields(RunConfig)}
        names |= flat(settings).keys()
    return names | {"run.num_images", "run.images_per_batch", "run.world_size"}


def newest(output):
    return checkpoint_paths(output)[-1]


def test_every_name_in_the_table_is_a_setting():
    known = set().union(*map(flat_names, (PRETRAIN, FINETUNE, SEGMENT, TOKENIZER)))
    assert not (resume.HABITS | resume.ADVISED) - known
    assert not resume.HABITS & resume.ADVISED


def test_the_page_has_the_table_of_the_code():
    text = PAGE.read_text(encoding="utf-8")
    rows = {
        kind: set(re.findall(r"`([a-z_.]+)`", line))
        for kind in ("habit", "advised")
        for line in text.splitlines()
        if line.startswith(f"| {kind} |")
    }
    assert rows["habit"] == resume.HABITS
    assert rows["advised"] == resume.ADVISED | {resume.NUM_IMAGES, "run.ema_decay"}


def test_settings_of_another_run_are_listed_and_a_new_switch_that_is_off_is_none():
    stored = {"model": {"depth": 2}}
    off = {"drop_path_compact": False, "drop_rate": 0.0, "use_fc_norm": None}
    assert check_settings("run", stored, {"model": {"depth": 2, **off}}) == []
    implied = {"weight_decay_on_rel_pos_bias": True}
    assert check_settings("run", stored, {"model": {"depth": 2}, **implied}) == []
    changed = {"model": {"depth": 3, "drop_path_compact": True}}
    with pytest.raises(
        CheckpointError, match=r"depth was 2, is 3; .*compact was 'absent', is True"
    ) as refused:
        check_settings("run", stored, changed)
    (names,) = re.findall(r"--run\.resume_with '\[(.*)\]'", str(refused.value))
    found = check_settings("run", stored, changed, accepted=names.split(","))
    assert [change.name for change in found] == ["model.depth", "model.drop_path_compact"]
    with pytest.raises(CheckpointError, match="depth was 2"):
        check_settings("run", stored, changed, accepted=["model.drop_path_compact"])
    with pytest.raises(CheckpointError, match=r"names model\.dept, and there are no such settings"):
        check_settings("run", stored, changed, accepted=["model.dept"])


def test_a_switch_that_is_gone_and_was_off_is_no_difference():
    ours = {"model": {"depth": 2}}
    off = {"fold_layer_scale": False, "rate": 0.0, "other": None}
    assert check_settings("run", {"model": {"depth": 2, **off}}, ours) == []
    stored = {"model": {"depth": 2, "fold_layer_scale": True}}
    with pytest.raises(CheckpointError, match="fold_layer_scale was True, is 'absent'") as refused:
        check_settings("run", stored, ours)
    (name,) = re.findall(r"--run\.resume_with '\[(.*)\]'", str(refused.value))
    (change,) = check_settings("run", stored, ours, accepted=[name])
    assert change.name == name == "model.fold_layer_scale"


def test_a_long_list_is_told_apart_by_its_first_difference():
    classes = [f"class {number}" for number in range(1000)]
    stored = {"classes": classes}
    with pytest.raises(CheckpointError) as refused:
        check_settings("run", stored, {"classes": [*classes[:700], "x", *classes[701:]]})
    assert "1000 entries, has 1000; number 700 was 'class 700', is 'x'" in str(refused.value)
    with pytest.raises(CheckpointError, match="has 999; number 999 was 'class 999', is 'absent'"):
        check_settings("run", stored, {"classes": classes[:-1]})


def test_habits_of_an_older_manifest_are_no_difference():
    run = {"steps": 3, "cpu_threads": 1}
    stored = {"run": run, "grad_checkpointing": False, "data": {"num_threads": 2}}
    ours = {"run": {**run, "cpu_threads": 4}, "grad_checkpointing": True, "data": {}}
    assert check_settings("run", stored, ours) == []


@pytest.mark.parametrize(
    ("was", "now", "goes_on"),
    [(1000, 991, True), (1000, 990, True), (1000, 989, False), (5000, 4950, True), (12, 13, False)],
)
def test_a_few_unusable_images_may_be_removed(was, now, goes_on):
    stored, ours = ({"run": {"num_images": n}} for n in (was, now))
    if goes_on:
        assert len(check_settings("run", stored, ours)) == 1
        return
    with pytest.raises(CheckpointError, match=f"num_images was {was}, is {now}"):
        check_settings("run", stored, ours)
    assert check_settings("run", stored, ours, accepted=["run.num_images"])


def test_a_run_that_diverged_goes_on_with_what_its_error_advises(tmp_path, run_toy, toy_task):
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=3)
    with pytest.raises(NonFiniteLoss) as error:
        run_toy(tmp_path, toy_task(bad_step=6), save_every=3)
    advice = {"optim.lr": {"lr": 5e-3}, "optim.warmup_steps": {"warmup_steps": 8}}
    advice["optim.clip_grad"] = {"clip_grad": 0.1}
    for number, (name, change) in enumerate(advice.items()):
        assert f"--{name}" in str(error.value)
        with pytest.raises(NonFiniteLoss):
            run_toy(
                tmp_path, toy_task(bad_step=8 + number), save_every=1,
                optim=replace(optim, **change),
            )  # fmt: skip
    _, outcome = run_toy(tmp_path, optim=replace(optim, clip_grad=0.1))
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
