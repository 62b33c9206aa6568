"""Checkpoints are complete or absent, and a damaged byte is seen."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from beit_fast.train import state
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


@pytest.mark.promise("R9")
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


@pytest.mark.promise("R5", "R6")
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


@pytest.mark.promise("R4")
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


@pytest.mark.promise("R9")
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_old_ones_go_once_the_new_one_is_whole_and_never_below_what_is_kept(
    keep, tmp_path, monkeypatch
):
    counted, discard, rename = [], state._discard, Path.rename

    def count():
        whole = [path for path in checkpoint_paths(tmp_path) if load_checkpoint(path)]
        counted.append(len(whole))
        return [int(path.name[5:]) for path in whole]

    def watched(path):
        assert max(count()) == step  # the new one counts, before an old one goes
        assert counted[-1] == keep + 1
        discard(path)
        count()

    monkeypatch.setattr(state, "_discard", watched)
    monkeypatch.setattr(Path, "rename", lambda path, to: (count(), rename(path, to), count())[1])
    for step in range(1, 9):
        save(tmp_path, step, keep=keep)
        assert count() == list(range(max(1, step - keep + 1), step + 1))
        if step > keep:
            assert min(counted) >= keep
        elif step == keep:
            counted.clear()
    assert len(counted) > 30


@pytest.mark.promise("R9")
def test_an_old_one_that_cannot_be_deleted_is_a_warning_and_goes_later(
    tmp_path, monkeypatch, caplog
):
    def refuse(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    save(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(state, "_discard", refuse)
        save(tmp_path, 2, keep=1)
    (message,) = caplog.messages
    assert re.search(r"old checkpoint \S+step_00000001 was not deleted: .*not permitted", message)
    assert [load_checkpoint(p).step for p in checkpoint_paths(tmp_path)] == [1, 2]
    save(tmp_path, 3, keep=1)
    assert [load_checkpoint(p).step for p in checkpoint_paths(tmp_path)] == [3]


@pytest.mark.promise("R9")
@pytest.mark.parametrize("kind", ["bit", "header", "cut", "manifest"])
def test_a_disk_that_gives_other_bytes_than_were_written_is_told_before_an_old_one_goes(
    kind, tmp_path, monkeypatch
):
    save(tmp_path, 1, keep=1)
    flush = state._flush

    def spoil(path):
        flush(path)
        content = bytearray(path.read_bytes())
        if kind == "bit" and path.name == "model.safetensors":
            content[-1] ^= 1
        elif kind == "header" and path.name == "model.safetensors":
            content[content.index(b"pt")] ^= 1
        elif kind == "cut" and path.name == "model.safetensors":
            del content[-1]
        elif kind == "manifest" and path.suffix == ".json":
            content[content.index(b"settings")] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(state, "_flush", spoil)
    name = "manifest.json" if kind == "manifest" else "model.safetensors"
    with pytest.raises(OSError, match=rf"step 2 not written .*{name} (does not read as it|is dam)"):
        save(tmp_path, 2, keep=1)
    assert [load_checkpoint(p).step for p in checkpoint_paths(tmp_path)] == [1]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.promise("R4")
def test_leftovers_are_deleted_at_the_start_and_said(tmp_path, caplog):
    save(tmp_path, 1)
    for name in (".step_00000002", ".step_00000001.old"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    state.remove_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert len(caplog.messages) == 2
    assert all("left by a run that was killed" in line for line in caplog.messages)


def test_the_commit_is_that_of_the_code_that_runs_and_asked_once(monkeypatch):
    state.environment.cache_clear()
    asked = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: asked.append(a) or run(*a, **k))
    assert state.environment() == state.environment()
    assert len(asked) == 1
