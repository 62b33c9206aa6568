"""The line that says what a folder holds, and how folders are opened."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from beit_fast.cli import main
from beit_fast.data.sources.class_folders import class_folders
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.data.sources.subset import Subset
from beit_fast.tasks import sources
from beit_fast.tasks.sources import describe_source, open_source, say, task_settings
from beit_fast.train.changes import without_habits
from beit_fast.train.stop import Interrupted, stop_signals
from beit_fast.train.world import World

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Two classes; one image is a link, one file of another format."""
    for name in ("far.png", "data/a/1.png", "data/b/2.png", "data/b/3.avif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "data/a/far.png").symlink_to(tmp_path / "far.png")
    return tmp_path / "data"


def test_the_line_has_images_links_classes_and_what_is_left_out(folder):
    source, _, classes = class_folders(folder)
    said = "3 images, 1 of them by links, 2 classes, 1 other file (1 .avif) left out"
    assert describe_source(source, classes) == f"{folder}: {said}"
    assert describe_source(Subset(source, [0, 2]), classes) == f"2 of {folder}: {said}"
    said = "2 images, 1 other file (1 .avif), 1 link left out"
    assert describe_source(open_source(str(folder), follow_links=False)) == f"{folder}: {said}"
    assert describe_source(open_source("digits:test")) == "digits:test: 500 images"


def test_links_that_were_files_are_no_other_run(pretrain_config):
    followed, not_followed = (
        without_habits(task_settings(pretrain_config(data={"follow_links": follow})))
        for follow in (True, False)
    )
    assert followed == not_followed
    assert followed["data"] == {"batch_size": 4, "max_bad_share": 0.001}  # as of earlier versions


def test_parts_that_are_read_together_are_told(tmp_path):
    for name in ("train/1.jpg", "val/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    said = describe_source(open_source(str(tmp_path)))
    assert (
        said == f"{tmp_path}: 2 images, all of train, val (pass the path of one to read that alone)"
    )
    assert describe_source(open_source(str(tmp_path / "train"))) == f"{tmp_path}/train: 1 image"


def test_a_path_is_printed_as_it_is_by_one_rank(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"[x] b] :bee: \xff")
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"")
    line = describe_source(ImageFolder(folder))
    for rank in (0, 1):
        say(line, World(rank, 2, CPU))
    assert capsys.readouterr().out == f"{tmp_path}/[x] b] :bee: \\udcff: 1 image\n"


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "small", "--data.path"],  # of its tokenizer, which reads the same images
        ["pretokenize", "small", "--data.path"],
        ["tokenizer", "demo", "--data.path"],
        ["finetune", "small_data", "--init", "null", "--data.path"],
    ],
    ids=lambda command: command[0],
)
def test_a_command_that_is_to_follow_no_links_names_what_it_left_out(
    command, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # tokens have an output of their own, by default below here
    for name in ("c", "d"):
        (tmp_path / "linked" / name).mkdir(parents=True)
        (tmp_path / "linked" / name / "1.png").symlink_to(folder / "a" / "1.png")
    command = [*command, str(tmp_path / "linked"), "--run.output", str(tmp_path / "run")]
    assert main([*command, "--data.follow_links", "false"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "(2 links left out): expected" in line
    assert "pass --data.follow_links true" in line


def test_indexing_is_told_now_and_then_and_can_be_stopped(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(sources, "time", SimpleNamespace(monotonic=lambda: now))
    tell = sources.indexing()
    for now in (0.1, 1.9, 2.1, 11.9, 12.2, 13):
        tell(int(now), 20)
    said = "indexing the shards, which is done once"
    assert capsys.readouterr().out == f"{said}: 2 of 20\n{said}: 12 of 20\n"
    with stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="while the shards were indexed"):
            tell(14, 20)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "a")
    monkeypatch.setenv("MASTER_PORT", "1")
    tell = sources.indexing()
    now = 99.0
    tell(15, 20)
    assert capsys.readouterr().out == ""  # of one rank
