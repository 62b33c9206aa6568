"""Shards from folders and from other shards, after kills too, and what is never written over."""

import contextlib
import gc
import io
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from beit_fast import cli
from beit_fast.data.bad_samples import BadDataError
from beit_fast.data.sources.class_folders import class_folders
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.data.sources.opening import labelled_images, open_images
from beit_fast.tasks.pack import shards as shard_files
from beit_fast.tasks.pack import writing
from beit_fast.tasks.pack.config import PackConfig
from beit_fast.tasks.pack.shards import PackError
from beit_fast.tasks.pack.task import run_pack
from beit_fast.train.stop import Interrupted
from killed_saves import ended, fork
from labelled_images import COLOURS, write_class_folders
from object_server import serving
from shards import picture
from tables import row, write_table

OURS = (".pack", "_info.json", "classes.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eighteen images of three classes."""
    return write_class_folders(tmp_path_factory.mktemp("images"), 6, seed=0)


@pytest.fixture
def pack(folder, tmp_path):
    """`pack(**settings)`: eighteen images in shards of five, unless told otherwise."""

    def pack(images=folder, shards=tmp_path / "train", **settings):
        options = {"images_per_shard": 5, "num_threads": 2} | settings
        return run_pack(PackConfig(images=str(images), shards=str(shards), **options))

    return pack


def content(folder):
    """Every file that a pack writes, the records too, by its path."""
    folder = Path(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parts[len(folder.parts)] not in (".lock", ".beit_fast")
    }


def by_content(source, labels, classes):
    """(file, name of its class) of every image."""
    return sorted((source.read(n), classes[labels[n]]) for n in range(len(source)))


def members_of(folder):
    """Name -> bytes over all shards, in order."""
    found = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {entry.name: tar.extractfile(entry).read() for entry in tar}
    return found


def read_by_webdataset(folder):
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    gc.collect()  # it leaves the last file open
    return samples


LEAKS = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def test_training_reads_the_same_images_labels_and_names(folder, pack):
    out = pack()
    assert sorted(path.name for path in out.glob("[!.]*")) == [
        *("_info.json", "classes.json"),
        *(f"train-000{number}.tar" for number in range(4)),
    ]
    packed, original = labelled_images(out), class_folders(folder)
    assert packed[2] == original[2] == sorted(COLOURS)
    assert by_content(*packed) == by_content(*original)
    assert [*packed[0].shard_sizes] == [5, 5, 5, 3]
    assert (dict(packed[0].damage), packed[0].left_out()) == ({}, "")
    # Which image is which: the description has the name, and it is that file.
    members, source = members_of(out), original[0]
    for name, data in members.items():
        if name.endswith(".json"):
            described = json.loads(data)
            index = source.paths.index(described["filename"])
            key = name.removesuffix(".json")
            assert members[f"{key}.png"] == source.read(index)
            assert members[f"{key}.cls"] == b"%d" % original[1][index]
            assert described["label"] == original[1][index]


@LEAKS
def test_webdataset_and_timm_read_them(folder, pack):
    out = pack()
    samples = read_by_webdataset(out)
    assert len(samples) == 18
    original = class_folders(folder)
    got = sorted((s["png"], original[2][int(s["cls"])]) for s in samples)
    assert got == by_content(*original)
    assert all(json.loads(sample["json"])["label"] == int(sample["cls"]) for sample in samples)
    from timm.data.readers.reader_wds import _load_info, _parse_split_info

    split = _parse_split_info("train", _load_info(str(out)))
    assert [out / name for name in split.filenames] == sorted(out.glob("*.tar"))
    assert (split.num_samples, [*split.shard_lengths]) == (18, [5, 5, 5, 3])


def test_tarfile_writes_the_same_shard(pack):
    out = pack()
    for path in out.glob("*.tar"):
        file = io.BytesIO()
        with tarfile.open(path) as tar, tarfile.open(fileobj=file, mode="w") as again:
            again.format = tarfile.USTAR_FORMAT
            for entry in tar:
                again.addfile(entry, tar.extractfile(entry))
        assert file.getvalue() == path.read_bytes()


@pytest.mark.parametrize("settings", [{}, {"short_side": 32}], ids=["copied", "smaller"])
def test_the_bytes_do_not_depend_on_threads_or_place(folder, pack, tmp_path, settings):
    one = pack(num_threads=1, **settings)
    moved = shutil.copytree(folder, tmp_path / "moved" / "images")
    two = pack(moved, tmp_path / "b" / "train", num_threads=5, **settings)
    assert content(one) == content(two)


def test_the_order_is_drawn_from_the_seed_or_the_sources(folder, pack, tmp_path):
    def names(**settings):
        out = pack(shards=tmp_path / str(settings) / "train", **settings)
        files = members_of(out)
        return [json.loads(d)["filename"] for n, d in files.items() if n.endswith(".json")]

    in_order = names(shuffle=False)
    assert in_order == ImageFolder(folder).paths
    drawn, other = names(), names(seed=1)
    assert drawn != in_order != other != drawn
    assert sorted(drawn) == sorted(other) == in_order
    # NumPy's promise, and ours: a pack that goes on under another version has the same order.
    assert np.random.RandomState(0).permutation(18).tolist() == [in_order.index(n) for n in drawn]


def test_shards_are_packed_again_and_flat_folders_without_classes(folder, pack, tmp_path):
    first = pack()
    again = pack(first, tmp_path / "again", images_per_shard=7, seed=3)
    assert by_content(*labelled_images(again)) == by_content(*class_folders(folder))
    assert all(name[9].isdecimal() and name.count("_") == 1 for name in members_of(again))
    flat = folder / "red"
    with pytest.raises(PackError, match=r"in no class folder.*pass --labels false"):
        pack(flat, tmp_path / "flat")
    out = pack(flat, tmp_path / "flat", labels=False)
    assert not (out / "classes.json").exists()
    assert {Path(name).suffix for name in members_of(out)} == {".png", ".json"}
    assert len(open_images(out)) == 6


def test_tables_and_stores_are_packed_too(pack, tmp_path, monkeypatch):
    table = write_table(tmp_path / "tables" / "a.parquet", [row(number) for number in range(7)])
    out = pack(table)
    assert by_content(*labelled_images(out)) == by_content(*labelled_images(table))
    objects = {f"set/{'ab'[n % 2]}/{n}.jpg": picture(n) for n in range(9)}
    with serving(objects) as server:
        for name, value in server.s3().items():
            monkeypatch.setenv(name, value)
        server.meets("set/a/2.jpg", "500", "reset")
        out = pack("s3://bucket/set", tmp_path / "stored")
    wanted = sorted((data, key.split("/")[1]) for key, data in objects.items())
    assert by_content(*labelled_images(out)) == wanted


@LEAKS
def test_names_with_odd_letters_and_two_images_of_one_name(folder, pack, tmp_path):
    images = tmp_path / "odd"
    data = (folder / "red" / "0.png").read_bytes()
    names = [
        "a.b.c.png",
        "sp ace.png",
        "☃.png",
        "a\nb.png",
        os.fsdecode(b"\xff\xfe.png"),
        "__x__.png",
    ]
    names += ["same.png", "same.jpg", "sub/same.png", "[1].png", "x" * 250 + ".png", "-.png"]
    for number, (name, group) in enumerate(itertools.product(names, ("one", "ein großes"))):
        path = images / group / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + bytes([number]))  # after the end: each is another file
    out = pack(images)
    assert by_content(*labelled_images(out)) == by_content(*class_folders(images))
    samples = read_by_webdataset(out)
    assert len(samples) == len({sample["__key__"] for sample in samples}) == 2 * len(names)
    assert {json.loads(s["json"])["filename"] for s in samples} == {*ImageFolder(images).paths}


@pytest.mark.parametrize("name", ["bad\nname", os.fsdecode(b"\xff")])
def test_a_class_whose_name_cannot_be_written_is_refused_before_the_work(
    folder, pack, tmp_path, name
):
    images = shutil.copytree(folder, tmp_path / "images")
    (images / "red").rename(images / name)
    with pytest.raises(PackError, match="rename its folder"):
        pack(images)
    assert not (tmp_path / "train").exists()
    (images / name).rename(images / "[1] {a}")
    assert labelled_images(pack(images))[2] == ["[1] {a}", "blue", "green"]


# A kill at any moment.


class Killer:
    """Ends the process with SIGKILL at call number `at` of whatever changes the disk."""

    def __init__(self, at):
        self.left = at

    def count(self, function):
        def call(*arguments, **options):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def plant(self):
        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, self.count(getattr(os, name)))
        shard_files.ShardFile.add = self.count(shard_files.ShardFile.add)
        shard_files.flush_folder = self.count(shard_files.flush_folder)


@pytest.fixture(scope="module")
def broken_folder(folder, tmp_path_factory):
    """The same with an image that is cut."""
    images = shutil.copytree(folder, tmp_path_factory.mktemp("broken") / "images")
    path = images / "green" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    return images


def test_after_a_kill_at_any_moment_the_same_command_ends_with_the_same_bytes(
    broken_folder, pack, tmp_path
):
    images = shutil.copytree(broken_folder, tmp_path / "images")
    shutil.rmtree(images / "red")
    for path in images.glob("*/[0-2].png"):
        path.unlink()
    settings = {"short_side": 45, "images_per_shard": 3, "max_bad_share": 0.5}
    whole = content(pack(images, tmp_path / "whole" / "train", **settings))
    assert len([name for name in whole if name.endswith(".tar")]) == 2
    killed = 0
    for at in itertools.count(1):
        out = tmp_path / str(at) / "train"

        def run(at=at, out=out):
            Killer(at).plant()
            pack(images, out, **settings)

        how = ended(fork(run))
        # Whatever is called a shard is whole.
        for path in out.glob("*.tar"):
            assert path.read_bytes() == whole[path.name], at
        if how == "exit 0":
            break
        assert how == "killed"
        killed += 1
        pack(images, out, **settings)
        assert content(out) == whole, at
    assert killed > 25


def test_kills_at_random_one_after_another(folder, pack, tmp_path):
    whole = content(pack(shards=tmp_path / "whole" / "train"))
    rng, out, killed = random.Random(0), tmp_path / "train", 0
    for _ in range(12):
        pid = fork(pack)
        time.sleep(rng.uniform(0, 0.04))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        killed += ended(pid) == "killed"
    pack()
    assert killed
    assert content(out) == whole


def test_a_signal_ends_it_and_the_same_command_goes_on(folder, pack, tmp_path, monkeypatch):
    whole = content(pack(shards=tmp_path / "whole" / "train"))
    add, calls = shard_files.ShardFile.add, []

    def stop(self, blocks):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return add(self, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(shard_files.ShardFile, "add", stop)
        with pytest.raises(Interrupted, match="SIGTERM while packing; the same command goes on"):
            pack()
    out = tmp_path / "train"
    assert [path.name for path in out.glob("*.tar")] == ["train-0000.tar"]
    assert not list(out.glob(".*.tmp"))
    pack()
    assert content(out) == whole


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(folder, pack, tmp_path):
    whole = content(pack(shards=tmp_path / "whole" / "train"))
    reading, written = os.pipe()

    def full():
        os.dup2(written, 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, 25_000))  # fewer than a shard has
        os.environ["COLUMNS"] = "80"
        with open(2, "w", closefd=False) as cli.sys.stderr:
            logging.root.handlers.clear()
            arguments = [str(folder), str(tmp_path / "train"), "--images_per_shard", "5"]
            code = cli.main(["pack", *arguments])
        os._exit(code)

    assert ended(fork(full)) == "exit 1"
    os.close(written)
    with os.fdopen(reading) as file:
        said = file.read()
    assert len(said.splitlines()) == 1, said
    assert "train-0000.tar was not written (File too large; " in said
    assert "MiB free): make room, and the same command goes on" in said
    assert not list((tmp_path / "train").glob("*.tar"))
    assert not list((tmp_path / "train").glob(".*.tmp"))
    pack()
    assert content(tmp_path / "train") == whole


def test_a_disk_that_seems_too_small_is_told_before(pack, monkeypatch, caplog):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    pack()
    assert "has 0.0 GiB free and the shards want about 0.0" in caplog.text


def test_a_disk_that_gives_other_bytes_back_ends_it_without_that_shard(pack, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def flip(handle):
        fsync(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        if ".tar." in path:
            calls.append(path)
            if len(calls) == 2:
                os.pwrite(handle, b"\xff", 700)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flip)
        with pytest.raises(OSError, match="other bytes came back than were written"):
            pack()
    out = tmp_path / "train"
    assert [path.name for path in out.glob("*.tar")] == ["train-0000.tar"]
    assert len(open_images(pack())) == 18


# What lies there already.


def test_a_finished_pack_is_checked_and_stays(pack, capsys):
    out = pack()
    whole, times = content(out), {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    pack()
    assert "4 finished ones are whole and kept" in capsys.readouterr().out
    assert content(out) == whole
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times


def test_a_finished_shard_that_is_another_now_is_not_written_over(pack):
    out = pack()
    whole = content(out)
    changed = {name: bytearray(whole[name]) for name in ("train-0001.tar", "train-0002.tar")}
    changed["train-0002.tar"][5000] ^= 1
    changed["train-0001.tar"] = b"precious"
    for name, data in changed.items():
        (out / name).write_bytes(data)
    with pytest.raises(PackError, match=r"train-0001.tar, train-0002.tar in .*: remove them, and"):
        pack()
    assert content(out) == whole | changed
    for name in changed:
        (out / name).unlink()
    pack()
    assert content(out) == whole


def test_a_shard_that_comes_while_it_is_packed_is_not_written_over(pack, tmp_path, monkeypatch):
    out, add, calls = tmp_path / "train", shard_files.ShardFile.add, []

    def write(self, blocks):
        calls.append(1)
        if len(calls) == 8:
            (out / "train-0001.tar").write_bytes(b"precious")
        return add(self, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(shard_files.ShardFile, "add", write)
        with pytest.raises(PackError, match=r"train-0001.tar was not written by this command"):
            pack()
    assert (out / "train-0001.tar").read_bytes() == b"precious"
    (out / "train-0001.tar").unlink()
    assert len(open_images(pack())) == 18


def test_of_images_that_are_not_there_no_labels_are_spoken(pack, tmp_path):
    with pytest.raises(ValueError, match=r"does not exist: check the path$"):
        pack(tmp_path / "missing")


@pytest.mark.parametrize(
    "name",
    ["imagenet-0000.tar", "train-0000.tar", "train-0003.tar", "_info.json", "notes.txt", "sub"],
)
def test_a_folder_with_anything_else_is_refused_and_stays_as_it_was(pack, tmp_path, name):
    out = tmp_path / "train"
    out.mkdir()
    (out / name).mkdir() if name == "sub" else (out / name).write_bytes(b"precious")
    with pytest.raises(PackError, match=r"is not empty \(.*give another SHARDS"):
        pack()
    assert [path.name for path in out.iterdir()] == [name]


@pytest.mark.parametrize("name", ["imagenet-0000.tar", "train-0002.tar", "train-0004.tar"])
def test_a_shard_that_came_meanwhile_is_not_written_over(pack, tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(writing.Writer, "finish", lambda self, records: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack()
    out = tmp_path / "train"
    (out / name).write_bytes(b"precious")
    with pytest.raises(PackError, match="was not written by this command"):
        pack()
    assert (out / name).read_bytes() == b"precious"
    (out / name).unlink()
    assert len(open_images(pack())) == 18


def test_other_images_or_settings_are_refused_with_every_difference(folder, pack, tmp_path):
    out = pack()
    whole = content(out)
    with pytest.raises(PackError, match=r"seed was 0, is 1; short_side was null, is 32\)"):
        pack(seed=1, short_side=32)
    images = shutil.copytree(folder, tmp_path / "images")
    (images / "red" / "9.png").write_bytes((images / "red" / "0.png").read_bytes())
    with pytest.raises(PackError, match=r'images was ".*", is .*; labels was .*num_images was 18'):
        pack(images)
    assert content(out) == whole
    for settings in ({"num_threads": 1}, {"read_timeout": 5.0}, {"max_bad_share": 1.0}):
        pack(**settings)
    (out / ".pack" / "made_from.json").write_text("[")
    with pytest.raises(PackError, match=r"made_from.json cannot be read.*remove the folder"):
        pack()
    shutil.rmtree(out)
    pack()


def test_a_damaged_record_is_named_with_what_to_do(pack):
    out = pack()
    whole = content(out)
    (out / ".pack" / "train-0001.json").write_text('{"sha256": 3')
    with pytest.raises(PackError, match=r"train-0001.json is damaged.*remove both"):
        pack()
    (out / ".pack" / "train-0001.json").unlink()
    (out / "train-0001.tar").unlink()
    pack()
    assert content(out) == whole


@pytest.mark.promise("S10")
def test_links_that_lie_there_are_not_written_through(pack, tmp_path):
    out, victim = tmp_path / "train", tmp_path / "victim"
    out.mkdir()
    victim.mkdir()
    (out / ".pack").symlink_to(victim)
    with pytest.raises(PackError, match="is a link, and what it points at would be written to"):
        pack()
    assert not list(victim.iterdir())
    (out / ".pack").unlink()
    whole = content(pack(shards=tmp_path / "whole" / "train"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing.Writer, "finish", lambda self, records: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack()
    for name in ("_info.json", "classes.json"):
        (victim / name).write_bytes(b"precious")
        (out / name).symlink_to(victim / name)
    pack()
    assert {path.read_bytes() for path in victim.iterdir()} == {b"precious"}
    assert content(out) == whole


def test_two_at_a_time_are_refused(pack, tmp_path):
    out = tmp_path / "train"
    ready, go = os.pipe(), os.pipe()

    def hold():
        from beit_fast.train.lock import sole_user

        with sole_user(out):
            os.write(ready[1], b"1")
            os.read(go[0], 1)

    pid = fork(hold)
    os.read(ready[0], 1)
    with pytest.raises(ValueError, match=r"is in use by process .*give another SHARDS"):
        pack()
    os.write(go[1], b"1")
    assert ended(pid) == "exit 0"


@pytest.mark.parametrize("inside", ["shards", "red/shards"])
def test_shards_within_the_images_are_refused(folder, pack, inside):
    with pytest.raises(PackError, match=r"lies in .*give a SHARDS outside it"):
        pack(shards=folder / inside)
    assert not (folder / inside).exists()


def test_shards_beside_those_of_a_pattern_are_no_part_of_it(pack, tmp_path):
    first = pack()
    again = pack(first / "train-000{0..3}.tar", first / "again")
    assert len(open_images(again)) == 18


@pytest.mark.parametrize("name", ["tra in", "a/b", ".hidden", "grün", "x" * 101])
def test_a_name_that_shards_cannot_have_is_refused(pack, tmp_path, name):
    with pytest.raises(PackError, match="pass --name with letters"):
        pack(name=name)
    with pytest.raises(PackError, match="pass --name with letters"):
        pack(shards=tmp_path / "out put")
    out = pack(shards=tmp_path / "out put", name="validation")
    assert (out / "validation-0000.tar").exists()
    assert [*json.loads((out / "_info.json").read_text())["splits"]] == ["validation"]


def test_a_url_to_write_to_is_refused(pack):
    with pytest.raises(PackError, match="give a folder on a disk"):
        pack(shards="s3://bucket/shards")


# Broken images.


def test_a_broken_image_is_left_out_named_and_counted(broken_folder, pack, caplog, capsys):
    out = pack(broken_folder)
    name = str(broken_folder / "green" / "3.png")
    assert f"cannot use {name} (" in caplog.text
    assert caplog.text.count("it is left out") == 1
    assert "17 images in 4 shards" in (said := capsys.readouterr().out)
    assert "1 left out, named in _info.json" in said
    info = json.loads((out / "_info.json").read_text())
    assert [entry["image"] for entry in info["left_out"]] == ["green/3.png"]
    packed, (source, labels, classes) = labelled_images(out), class_folders(broken_folder)
    wanted = by_content(source, labels, classes)
    broken = (broken_folder / "green" / "3.png").read_bytes()
    assert by_content(*packed) == [entry for entry in wanted if entry[0] != broken]
    assert info["splits"]["train"]["num_samples"] == sum(packed[0].shard_sizes) == 17


def test_too_many_broken_images_end_it(broken_folder, pack, tmp_path):
    with pytest.raises(BadDataError, match="1 of 18 files are bad and --max_bad_share 0 allows 0"):
        pack(broken_folder, max_bad_share=0)
    assert len(open_images(pack(broken_folder, max_bad_share=0.1))) == 17


def test_a_shard_of_broken_images_alone_is_none(broken_folder, pack):
    out = pack(broken_folder, images_per_shard=1)
    whole = content(out)
    assert len(list(out.glob("*.tar"))) == 17
    assert (open_images(out).damage, len(open_images(out))) == ({}, 17)
    pack(broken_folder, images_per_shard=1)
    assert content(out) == whole


def test_an_image_that_cannot_be_read_ends_it_for_another_day_it_may_be_there(
    folder, pack, tmp_path, monkeypatch
):
    read = ImageFolder.read

    def fail(self, index):
        if self.paths[index] == "red/2.png":
            raise PermissionError(13, "Permission denied", self.name(index))
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "read", fail)
        with pytest.raises(PackError, match=r"2.png cannot be read .*give the same command again"):
            pack()
    assert len(open_images(pack())) == 18


def test_what_is_damaged_in_other_shards_is_told(pack, tmp_path, caplog):
    first = pack()
    path = first / "train-0003.tar"
    path.write_bytes(path.read_bytes()[:3000])
    out = pack(first, tmp_path / "again", labels=False)
    info = json.loads((out / "_info.json").read_text())
    assert list(info["damage"]) == [str(path)]
    assert f"cannot use {path}" in caplog.text
    assert len(open_images(out)) == len(open_images(first)) < 18


def test_several_ranks_are_refused(pack, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun started 2 processes, and pack runs in one"):
        pack()


def test_memory_holds_a_few_images_for_each_thread(folder, pack, monkeypatch):
    """A writer that is slow is not run away from."""
    add, made, written, ahead = shard_files.ShardFile.add, [], [], []
    members = writing.Packer.members

    def make(self, *arguments):
        made.append(1)
        return members(self, *arguments)

    def write(self, blocks):
        time.sleep(0.02)
        ahead.append(len(made) - len(written))
        written.append(1)
        return add(self, blocks)

    monkeypatch.setattr(writing, "_AT_ONCE", 4)
    monkeypatch.setattr(writing, "_FEWEST_AT_ONCE", 1)
    monkeypatch.setattr(writing.Packer, "members", make)
    monkeypatch.setattr(shard_files.ShardFile, "add", write)
    pack(num_threads=1)
    assert max(ahead) <= 4 + 2 * 4
