"""The line that says what a folder holds, and how folders are opened."""

import os
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from beit_fast.cli import main
from beit_fast.data.config import DataConfig
from beit_fast.data.sources.class_folders import class_folders
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.data.sources.subset import Subset
from beit_fast.recipes import PRETRAIN
from beit_fast.tasks import sources
from beit_fast.tasks.pretrain.pipeline import tokenizer_stage
from beit_fast.tasks.sources import describe_source, open_source, say, task_settings
from beit_fast.train.changes import check_settings, without_habits
from beit_fast.train.state import CheckpointError
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
    assert followed["data"] == {"batch_size": 4, "max_bad_share": 0.001, "shuffle": "full"}


def test_an_order_is_the_run_s_and_a_window_counts_where_there_is_one(pretrain_config):
    def settings(**data):
        return without_habits(task_settings(pretrain_config(data=data)))

    full, window = settings(), settings(shuffle="window", window=8)
    assert settings(window=8) == full  # nothing depends on it
    before = settings()
    del before["data"]["shuffle"]  # as earlier versions wrote it
    assert check_settings("run", before, full) == []
    for theirs, ours, said in (
        (before, window, "data.shuffle was 'full', is 'window'"),
        (window, settings(shuffle="window", window=4), "data.window was 8, is 4"),
    ):
        with pytest.raises(CheckpointError, match=said) as refused:
            check_settings("run", theirs, ours)
        (names,) = re.findall(r"--run\.resume_with '\[(.*)\]'", str(refused.value))
        assert check_settings("run", theirs, ours, accepted=names.split(","))


def test_a_tokenizer_of_the_same_images_reads_them_in_the_same_way():
    def order_of(path="", **order):
        training = replace(recipe.tokenizer_training, data=DataConfig(path=path, **order))
        data = DataConfig(path="shards", shuffle="window", window=8, cache="disk", cache_size=9)
        stage = tokenizer_stage(replace(recipe, data=data, tokenizer_training=training))
        kept.append((stage.data.cache, stage.data.cache_size))
        return stage.data.path, stage.data.shuffle, stage.data.window

    recipe, kept = PRETRAIN["small"](), []
    assert order_of() == ("shards", "window", 8)
    assert order_of(shuffle="window", window=4) == ("shards", "window", 4)
    assert order_of(path="others") == ("others", "full", 16)
    assert order_of(cache="other", cache_size=5) == ("shards", "window", 8)
    assert kept == [("disk", 9), ("disk", 9), ("", 64), ("other", 5)]


def test_a_window_over_a_folder_is_refused_before_anything_begins(folder, tmp_path, capsys):
    command = ["tokenizer", "demo", "--data.path", str(folder), "--data.shuffle", "window"]
    assert main([*command, "--run.output", str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"beit-fast: --data.shuffle is window and {folder}/a/1.png lies in no shard: pass "
        "--data.shuffle full, or shards or tables as --data.path"
    )


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
