"""Checkpoints are complete or absent, and a damaged byte is seen."""

import json
import shutil

import pytest
import torch

from beit_fast.train.state import (
    CheckpointError,
    checkpoint_paths,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from damaged import damages, not_refused

SAID = {"beit_fast.config": "{}"}
TENSORS = {"model": {"w": torch.arange(6.0).view(2, 3)}, "run": {"n": torch.tensor(3)}}


def save(output, step, keep=3):
    return save_checkpoint(output, step, TENSORS, {"a": {"b": 1}}, keep=keep)


def test_a_checkpoint_reads_back_what_was_saved(tmp_path):
    read = load_checkpoint(save(tmp_path, 5))
    assert read.step == 5
    assert read.manifest["settings"] == {"a": {"b": 1}}
    for stem, values in TENSORS.items():
        for name, value in values.items():
            assert torch.equal(read.tensors[stem][name], value)


def test_only_the_newest_stay(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint_paths(tmp_path)] == ["step_00000003", "step_00000004"]


@pytest.mark.promise("R5")
def test_200_damages_of_all_files_are_refused_and_the_file_named(tmp_path):
    more = {
        name: {k: v.clone() for k, v in TENSORS["model"].items()} for name in ("ema", "optimizer")
    }
    path = save_checkpoint(tmp_path, 1, TENSORS | more, {"a": {"b": 1}}, keep=3, metadata=SAID)
    files = sorted(path.iterdir())
    assert len(files) == 5
    tried = []

    def load(_):
        tried.append(1)
        load_checkpoint(path)

    for file in files:
        assert not_refused(file, damages(file, flips=40, zeroed=5), load) == []
    assert len(tried) >= 200
    load_checkpoint(path)


@pytest.mark.parametrize("damage", ["cut", "missing", "empty", "manifest", "traversal", "format"])
def test_a_damaged_checkpoint_names_the_file_and_falls_back_only_when_told(tmp_path, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file = newest / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "empty":
        for child in newest.iterdir():
            child.unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text("{")
    else:
        manifest = json.loads((newest / "manifest.json").read_text())
        if damage == "format":
            manifest["format"] = 99
        else:
            manifest["files"] = {"../../x.safetensors": "0"}
        (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="step_00000002"):
        load_newest(tmp_path)
    assert load_newest(tmp_path, fallback=True).step == 1
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000001")
    with pytest.raises(CheckpointError, match="step_00000002"):
        load_newest(tmp_path, fallback=True)


def test_a_folder_that_a_crash_left_does_not_count_and_is_removed(tmp_path):
    save(tmp_path, 1)
    stale = tmp_path / "checkpoints" / ".step_00000002"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path).step == 1
    save(tmp_path, 3)
    assert not stale.exists()


@pytest.mark.promise("S10")
def test_links_in_its_way_go_and_what_they_point_at_stays(tmp_path):
    victim = tmp_path / "victim"
    for number, name in enumerate((".step_00000002", ".step_00000001.old", "step_00000002")):
        (victim / str(number)).mkdir(parents=True)
        (victim / str(number) / "kept").write_text("precious")
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).symlink_to(victim / str(number))
    save(tmp_path, 2)
    save(tmp_path, 2)  # deletes one that was there
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert not (tmp_path / "checkpoints" / "step_00000002").is_symlink()
    assert [(victim / n / "kept").read_text() for n in "012"] == ["precious"] * 3


def test_a_failed_save_leaves_the_last_checkpoint_and_says_why(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("beit_fast.train.state.save_file", full)
    with pytest.raises(OSError, match=r"step 2 not written .* MiB free.*No space left"):
        save(tmp_path, 2)
    assert load_newest(tmp_path).step == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_no_checkpoint_is_no_error(tmp_path):
    assert load_newest(tmp_path) is None
