"""Errors of files name them."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch

from beit_fast.files import (
    damage,
    describe,
    drop,
    naming,
    new_file,
    open_no_link,
    refuse_other_kinds,
    replace_file,
    replace_text,
)
from beit_fast.tasks.probe.features import _allocate
from beit_fast.tokenizer.checkpoint import load_tokenizer, save_tokenizer
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.train.log import Log
from beit_fast.viz.curves import draw_curves
from beit_fast.viz.layers import draw_layers
from beit_fast.viz.reconstruction import draw_columns
from beit_fast.weights.files import read_weights, write_weights

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_without_a_name_gets_one_and_is_said_as_it_is():
    with pytest.raises(OSError, match="No space") as raised, naming("runs/[x]/a"):
        full()
    assert describe(raised.value) == "runs/[x]/a: No space left on device"
    with pytest.raises(OSError, match="our own words") as raised, naming("runs/a"):
        raise OSError("our own words")
    assert describe(raised.value) == "our own words"
    assert describe(ValueError("a value")) == "a value"
    assert damage(KeyError("format")) == "KeyError: 'format'"
    assert len(damage(ValueError("x\n" * 900))) == 200
    drop(Path("no/such/file"))


def test_a_file_is_replaced_whole_whatever_a_killed_process_left(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"old")
    (tmp_path / f".w.{os.getpid()}.tmp").write_bytes(b"half")  # by one of the same number
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, lambda file: (file.write(b"half"), signal.raise_signal(signal.SIGINT)))
    assert path.read_bytes() == b"old"
    replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 2


def planted(folder):
    """A link and what it points at."""
    victim, link = folder / "victim", folder / "link"
    victim.write_bytes(b"precious")
    link.unlink(missing_ok=True)
    link.symlink_to(victim)
    return victim, link


@pytest.mark.promise("S10")
def test_what_takes_the_place_of_a_link_leaves_its_target(tmp_path):
    def write_text(path):
        replace_text(path, "ours")

    def write_new(path):
        with new_file(path) as file:
            file.write(b"ours")

    for write in (write_text, write_new):
        for _ in range(2):  # of a link, of a file
            victim, link = planted(tmp_path)
            write(link)
            assert (victim.read_bytes(), link.read_bytes()) == (b"precious", b"ours")
            assert not link.is_symlink()
        link.unlink()
        write(link)  # and of nothing
        assert link.read_bytes() == b"ours"
    victim, link = planted(tmp_path)
    _allocate(link, (2, 3))
    assert victim.read_bytes() == b"precious"


@pytest.mark.promise("S10")
def test_metrics_are_written_through_no_link_and_without_it_they_are_written(tmp_path):
    (tmp_path / "victim").write_text('{"step": 1}\n{"step": 2}\n')
    for start in (0, 1):  # a new run, and one that cuts the lines past its checkpoint
        (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "victim")
        with pytest.raises(
            OSError, match=r"metrics\.jsonl is a link, and what.*: remove it"
        ) as info:
            Log(tmp_path, title="train", start=start, num_steps=2)
        assert describe(info.value).startswith(str(tmp_path / "metrics.jsonl"))
        (tmp_path / "metrics.jsonl").unlink()
        log = Log(tmp_path, title="train", start=start, num_steps=2)
        (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "victim")
        with pytest.raises(OSError, match="is a link"):  # one that is planted meanwhile
            log.line(2, {"loss": 1.0})
        (tmp_path / "metrics.jsonl").unlink()
        log.line(2, {"loss": 1.0})
        log.close()
        assert '"loss": 1.0' in (tmp_path / "metrics.jsonl").read_text()
        (tmp_path / "metrics.jsonl").unlink()
    assert (tmp_path / "victim").read_text() == '{"step": 1}\n{"step": 2}\n'
    with pytest.raises(FileNotFoundError):
        open_no_link(tmp_path / "metrics.jsonl", os.O_RDONLY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty and not weights: copy or download it anew"),
        (b"\n<!doctype html><html>", "is a web page and not weights: download the file itself"),
        (b"\xef\xbb\xbf<HTML>", "is a web page"),
        (b'<?xml version="1.0"?><Error>', "is a web page"),
        (POINTER, "is git-lfs's note of a file and not weights: `git lfs pull` fetches it"),
        (b"\x1f\x8b\x08\0", "is an archive and not weights: unpack it first"),
    ],
)
def test_what_comes_in_the_place_of_a_file_is_told(content, message, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        refuse_other_kinds(path, "weights")
    assert str(raised.value).startswith(str(path))
    for read in (read_weights, load_tokenizer):
        with pytest.raises(ValueError, match=message.partition(" and not")[0]):
            read(path)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_a_cut_file_of_torch_save_is_named(share, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": {"a": torch.zeros(100)}}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"copy it anew|damaged") as raised:
        read_weights(path)
    assert str(path) in str(raised.value)


def test_a_full_disk_is_named_by_every_writer(tmp_path, monkeypatch):
    dvae = Dvae(DvaeConfig(vocab_size=8, encoder_width=4, decoder_width=4, decoder_input_width=4))
    image = {"a": torch.zeros(1, 3, 8, 8)}
    writers = {
        "w.pth": lambda path: write_weights(path, {"a": torch.zeros(1)}),
        "w.safetensors": lambda path: write_weights(path, {"a": torch.zeros(1)}),
        "t.safetensors": lambda path: save_tokenizer(dvae, path),
        "features.npy": lambda path: _allocate(path, (2, 3)),
        "curve.png": lambda path: draw_curves([{"step": 1, "loss": 1.0}], path),
        "layers.png": lambda path: draw_layers({"a": [0.5]}, path),
        "picture.png": lambda path: draw_columns(image, path),
    }
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    for name, write in writers.items():
        with pytest.raises(OSError, match="No space left") as raised:
            write(tmp_path / name)
        assert describe(raised.value) == f"{tmp_path / name}: No space left on device"
        assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_by_the_log(tmp_path, monkeypatch):
    log = Log(tmp_path, title="train", start=0, num_steps=2)
    monkeypatch.setattr(log, "_path", Path("/dev/full"))
    with pytest.raises(OSError, match="No space left") as raised:
        log.line(1, {"loss": 1.0})
    log.close()
    assert describe(raised.value).startswith("/dev/full: No space left on device")
