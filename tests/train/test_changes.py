"""Which settings may change at a resume: habits are free, the rest is told or needs a word."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from beit_fast.recipes import FINETUNE, PRETRAIN, SEGMENT, TOKENIZER
from beit_fast.tasks.sources import task_settings
from beit_fast.train import changes
from beit_fast.train.agreement import flat
from beit_fast.train.changes import check_settings
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.state import CheckpointError

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
    return names | {"data.images", "run.num_images", "run.images_per_batch", "run.world_size"}


def test_every_name_in_the_table_is_a_setting():
    known = set().union(*map(flat_names, (PRETRAIN, FINETUNE, SEGMENT, TOKENIZER)))
    assert not (changes.HABITS | changes.ADVISED) - known
    assert not changes.HABITS & changes.ADVISED


def test_the_page_has_the_table_of_the_code():
    text = PAGE.read_text(encoding="utf-8")
    rows = {
        kind: set(re.findall(r"`([a-z_.]+)`", line))
        for kind in ("habit", "advised")
        for line in text.splitlines()
        if line.startswith(f"| {kind} |")
    }
    assert rows["habit"] == changes.HABITS
    assert rows["advised"] == changes.ADVISED | {
        changes.IMAGES,
        changes.NUM_IMAGES,
        "run.ema_decay",
    }


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
    """Of runs of a version that kept no list of them."""
    stored, ours = ({"run": {"num_images": n}} for n in (was, now))
    if goes_on:
        assert len(check_settings("run", stored, ours)) == 1
        return
    with pytest.raises(CheckpointError, match=f"num_images was {was}, is {now}"):
        check_settings("run", stored, ours)
    assert check_settings("run", stored, ours, accepted=["run.num_images"])
