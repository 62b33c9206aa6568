"""A run whose newest checkpoint is damaged is not gone on with, and not begun anew in its place."""

import json
import shutil
from pathlib import Path

import pytest

from beit_fast.cli import main
from beit_fast.manifest import manifest_text
from beit_fast.train.log import read_metrics
from task_runs import steps_of

pytestmark = pytest.mark.promise("R6")

WRITTEN = Path(__file__).parent / "written_before"
WEIGHTS = ("model.safetensors", "optimizer.safetensors", "run.safetensors")
FILES = (*WEIGHTS, "manifest.json")
COMMAND = ["pretrain", "digits", "--config", "format_2/pretrain.yaml", "--run.steps", "6"]


@pytest.fixture
def newest(tmp_path, monkeypatch):
    """The newest step's folder of a run with two, in a folder in which its configuration holds."""
    for name in ("images", "format_2"):
        shutil.copytree(WRITTEN / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "format_2" / "run" / "checkpoints" / "step_00000004"


def rewrite(folder, **changes):
    """The manifest with other entries, and their digest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    content = {k: v for k, v in (manifest | changes).items() if k not in ("format", "sha256")}
    (folder / "manifest.json").write_text(manifest_text(content))


def with_file(name):
    """Changes that list a file by that name, in the place of the model's."""

    def change(folder):
        files = json.loads((folder / "manifest.json").read_text())["files"]
        digest = files.pop("model.safetensors")
        rewrite(folder, files={name: digest, **files})

    return change


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def foreign(folder):
    empty(folder)
    (folder / "notes.txt").write_text("not a checkpoint")


DAMAGES = {
    **{f"{name} cut": cut(name, -1) for name in FILES},
    **{f"{name} empty": cut(name, 0) for name in FILES},
    **{f"{name} gone": lambda folder, name=name: (folder / name).unlink() for name in FILES},
    "empty folder": empty,
    "foreign folder": foreign,
    "a list": lambda folder: (folder / "manifest.json").write_text("[1, 2]"),
    "null": lambda folder: (folder / "manifest.json").write_text("null"),
    "deep": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "another step": lambda folder: rewrite(folder, step=5),
    "step 0": lambda folder: rewrite(folder, step=0),
    "settings null": lambda folder: rewrite(folder, settings=None),
    "files null": lambda folder: rewrite(folder, files=None),
    "outside": with_file("../x.safetensors"),
    "absolute": with_file("/x.safetensors"),
    "nul": with_file("x\0.safetensors"),
    "long": with_file("x" * 5000 + ".safetensors"),
    "another file": with_file("x.safetensors"),
    "no weights": with_file("model.pth"),
    "a folder": lambda folder: [(folder / WEIGHTS[0]).unlink(), (folder / WEIGHTS[0]).mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_and_never_a_fresh_start(damage, newest, capsys):
    run = newest.parent.parent
    metrics = (run / "metrics.jsonl").read_bytes()
    DAMAGES[damage](newest)
    assert main(COMMAND) == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1
    assert "checkpoints/step_00000004" in lines[0]
    assert "step 1/6" not in said.out
    assert steps_of(run) == [2, 4]
    assert (run / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.promise("R24")
def test_a_damaged_line_of_the_metrics_is_said_and_the_others_count_at_a_resume(newest, caplog):
    run = newest.parent.parent
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([b"\xff" + lines[0], *lines[1:3], lines[3][:9], b""]))
    assert main([*COMMAND[:-1], "5"]) == 0
    (said,) = [line for line in caplog.messages if "metrics" in line]
    assert "metrics.jsonl: lines 1, 4 are damaged: moved to metrics.damaged, the others" in said
    assert path.read_bytes().splitlines()[:2] == lines[1:3]
    assert [record["step"] for record in read_metrics(path)] == [2, 3, 5]
    aside = (run / "metrics.damaged").read_bytes()
    assert aside.splitlines() == [b"\xff" + lines[0], lines[3][:9]]
    caplog.clear()
    assert main([*COMMAND[:-1], "5"]) == 0
    assert not [line for line in caplog.messages if "metrics" in line]


def test_the_remedy_goes_on_from_the_checkpoint_before(newest, capsys):
    (newest / "model.safetensors").unlink()
    assert main(COMMAND) == 1
    assert "Pass --run.fallback true" in capsys.readouterr().err
    assert main([*COMMAND, "--run.fallback", "true"]) == 0
    assert "resumes from format_2/run/checkpoints/step_00000002" in capsys.readouterr().out
    assert steps_of(newest.parent.parent) == [4, 6]
