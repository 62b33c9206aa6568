import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from beit_fast.data.bad_samples import BadSamples
from beit_fast.data.listing import Listing
from beit_fast.data.sources.decode import BadImageError, decode_fast
from beit_fast.data.sources.folder import ImageFolder, damage_of, keys_of
from beit_fast.data.sources.opening import labelled_images, open_images
from beit_fast.data.sources.tar_shards import TarShards
from beit_fast.tasks.sources import describe_source
from shards import entry, picture, write_shards, write_tar


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "shards", 3, 4)


def names(source):
    return [source.key(index) for index in range(len(source))]


def write(folder, **shards):
    folder.mkdir(exist_ok=True)
    for name, content in shards.items():
        data = content if isinstance(content, bytes) else write_tar(content)
        (folder / f"{name}.tar").write_bytes(data)
    return folder


def images(*names):
    return [(f"{name}.jpg", name.encode()) for name in names]


def test_images_are_those_of_all_shards_in_their_order(folder):
    source = open_images(folder)
    assert isinstance(source, TarShards)
    assert [source.read(index) for index in range(len(source))] == [*map(picture, range(12))]
    assert names(source)[4] == "train-0001.tar/n00000001_4.jpg"
    assert source.name(4) == f"{folder}/train-0001.tar/n00000001_4.jpg"
    assert source.size(4) == len(picture(4))
    assert source.shard_sizes == [4, 4, 4]
    assert (source.damage, source.left_out()) == ({}, "")
    assert describe_source(source) == f"{folder}: 12 images"
    for index in (12, -1):
        with pytest.raises(IndexError):
            source.read(index)


def test_keys_are_made_when_they_are_asked_for(tmp_path):
    content = {f"{n}": [*images(*(f"{n}_{i}" for i in range(n)))] for n in (0, 2, 3)}
    source = open_images(write(tmp_path, **content, **{"1": b"", "4": write_tar([])}))
    assert source.shard_sizes == [0, 0, 2, 3, 0]
    all_ = ["2.tar/2_0.jpg", "2.tar/2_1.jpg", *(f"3.tar/3_{number}.jpg" for number in range(3))]
    keys = keys_of(source)
    assert (len(keys), [*keys], names(source)) == (5, all_, all_)
    for first in range(-1, 7):
        for last in range(-1, 7):
            assert keys[first:last] == all_[first:last]
    assert (keys[-1], keys[::2]) == (all_[-1], all_[::2])
    listing = Listing.of(source)
    assert listing.digest == replace(listing, names=all_).digest
    with pytest.raises(IndexError):
        keys[5]


PATTERNS = {
    "": 12,
    "*.tar": 12,
    "train-*.tar": 12,
    "train-{0000..0001}.tar": 8,
    "{train-0002,train-0000}.tar": 8,
    "train-0001.tar": 4,
    "train-000[12].tar": 8,
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_path_is_a_folder_one_shard_or_a_pattern(pattern, folder):
    source = open_images(f"{folder}/{pattern}")
    assert len(source) == PATTERNS[pattern]
    assert str(folder) in source.path


def test_the_digest_is_of_names_and_sizes_and_not_of_where_they_lie(folder, tmp_path):
    digest = open_images(folder).digest()
    shutil.copytree(folder, tmp_path / "moved")
    assert open_images(tmp_path / "moved").digest() == digest
    assert open_images(f"{folder}/train-000[01].tar").digest() != digest
    write(tmp_path / "a", x=[("1.jpg", b"aa"), ("2.jpg", b"b")])
    write(tmp_path / "b", x=[("1.jpg", b"a"), ("2.jpg", b"bb")])
    write(tmp_path / "c", x=[("2.jpg", b"aa"), ("1.jpg", b"b")])
    assert len({open_images(tmp_path / name).digest() for name in "abc"}) == 3


def test_threads_read_at_once(folder):
    source, wrong = open_images(folder), []

    def read(first):
        for index in range(100):
            number = (first + 5 * index) % 12
            if source.read(number) != picture(number):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.promise("R16")
def test_of_a_damaged_shard_what_lies_before_is_used_and_it_is_named_and_counted(tmp_path, caplog):
    whole = write_tar([(f"{n}.jpg", picture(n)) for n in range(4)])
    third = whole.index(b"2.jpg\0")
    flipped = bytearray(whole)
    flipped[third] ^= 1
    folder = write(
        tmp_path,
        **{"0_whole": whole, "1_cut": whole[: third + 800], "2_flipped": bytes(flipped)},
        **{"3_empty": b"", "4_none": b"no tar" * 999, "5_whole": whole},
    )
    for _ in range(2):  # indexed, and kept
        source = open_images(folder)
        assert source.shard_sizes == [4, 2, 2, 0, 0, 4]
        numbers = [0, 1, 2, 3, 0, 1, 0, 1, 0, 1, 2, 3]
        assert [source.read(index) for index in range(12)] == [*map(picture, numbers)]
        assert names(source)[8] == "5_whole.tar/0.jpg"
        damaged = [f"{folder}/{name}.tar" for name in ("1_cut", "2_flipped", "3_empty", "4_none")]
        assert list(source.damage) == damaged
        said = [*source.damage.values()]
        assert said[0] == (
            f"it is cut: 2.jpg has {len(picture(2))} bytes from byte {third + 512} on, and the "
            f"file ends at {third + 800}; 2 images before that"
        )
        assert said[2:] == [
            "it is empty; 0 images before that",
            "it is no tar; 0 images before that",
        ]
        assert f"4 damaged shards ({damaged[0]}: it is cut" in source.left_out()
    bad = BadSamples(source, 0.5)  # what a loader counts by
    assert bad.by_name() == source.damage
    assert all(f"cannot use {name}" in caplog.text for name in damaged)


@pytest.mark.promise("S4", "S6")
def test_nothing_is_taken_out_of_a_shard(tmp_path):
    content = [
        ("../escaped.jpg", b"x"),
        ("/tmp/escaped.jpg", b"x"),
        (entry("link.jpg", b"2", "/etc/passwd"), b""),
        ("code.pkl", b"cos\nsystem\n(S'touch ran'\ntR."),
        ("code.pyd", b"MZ"),
        *images("a", "b"),
    ]
    folder = write(tmp_path / "shards", x=content)
    source = open_images(folder)
    assert [source.read(index) for index in range(2)] == [b"a", b"b"]
    assert source.left_out() == (
        "2 other files (1 .pkl, 1 .pyd), 1 link or device, 2 names that lead elsewhere left out"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]
    assert sorted(path.name for path in folder.iterdir()) == [".beit_fast", "x.tar"]
    assert not os.path.exists("/tmp/escaped.jpg")


def test_a_shard_that_is_changed_under_a_run_gives_no_bytes_of_other_places(folder):
    source = open_images(folder)
    path = folder / "train-0001.tar"
    data = path.read_bytes()
    path.write_bytes(write_tar([("other.jpg", b"o" * (len(data) - 10240))]))
    assert source.read(0) == picture(0)
    with pytest.raises(BadImageError, match=r"changed since .* start the command again"):
        source.read(5)
    again = open_images(folder)  # as it says
    assert names(again)[4] == "train-0001.tar/other.jpg"
    path.write_bytes(b"")
    with pytest.raises(OSError, match=r"0 of .* bytes"):
        again.read(4)


def test_a_shard_with_the_size_and_time_of_another_is_indexed_anew_by_the_next_command(tmp_path):
    write(tmp_path, x=images("one", "two"))
    open_images(tmp_path)
    (kept,) = (tmp_path / ".beit_fast").glob("*.index")
    of_before = kept.read_bytes()
    status = (tmp_path / "x.tar").stat()
    write(tmp_path, x=images("two", "one"))
    os.utime(tmp_path / "x.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    stale = open_images(tmp_path)
    assert names(stale)[0] == "x.tar/one.jpg"
    for index in (0, 1, 0):
        with pytest.raises(BadImageError, match="indexed: start the command again, and it is ind"):
            stale.read(index)
    again = open_images(tmp_path)  # as it says
    assert [again.read(index) for index in range(2)] == [b"two", b"one"]

    kept.write_bytes(of_before)
    stale = open_images(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", unable)
        with pytest.raises(BadImageError) as raised:
            stale.read(0)
    assert f"indexed: remove {kept} and start the command again" in str(raised.value)
    kept.unlink()  # as it says
    assert open_images(tmp_path).read(0) == b"two"


def unable(*_, **__):
    raise PermissionError("no")


@pytest.mark.parametrize("with_classes", [True, False])
def test_the_image_before_the_damage_counts_only_if_its_class_is_there_as_well(
    with_classes, tmp_path
):
    keys = [
        [(f"{number}.left.jpg", b"l"), (f"{number}.right.jpg", b"r"), (f"{number}.cls", b"1")]
        for number in range(3)
    ]
    content = [one for key in keys for one in (key if with_classes else key[:2])]
    data = write_tar(content, end=False)
    last = len(write_tar(content[:-1], end=False))  # where the last member begins
    write(tmp_path, x=data[: last + 100], y=[("z.jpg", b"z"), ("z.cls", b"0")])
    source = open_images(tmp_path)
    assert len(source) == (5 if with_classes else 6)
    assert "it is cut" in source.damage[f"{tmp_path}/x.tar"]
    if with_classes:
        assert labelled_images(tmp_path)[1].tolist() == [1, 1, 1, 1, 0]


def test_classes_are_numbers_until_a_file_beside_the_shards_names_them(folder):
    source, labels, classes = labelled_images(folder)
    assert (len(source), classes) == (12, ["0", "1", "2"])
    assert labels.tolist() == [number % 3 for number in range(12)]
    assert labels.dtype.is_signed and labels.itemsize == 8  # noqa: PT018
    (folder / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    assert labelled_images(folder)[2] == ["ant", "bee", "cat", "dog"]
    (folder / "classes.txt").unlink()
    (folder / "classes.json").write_text('["a", "b", "c"]')
    assert labelled_images(f"{folder}/train-0001.tar")[2] == ["a", "b", "c"]
    (folder / "classes.json").write_text('["a", "b"]')
    with pytest.raises(ValueError, match=r"classes.json names 2 classes, and .* of class 2: name"):
        labelled_images(folder)
    (folder / "classes.json").write_text("[")
    with pytest.raises(ValueError, match=r"classes.json is no valid JSON"):
        labelled_images(folder)


def test_images_without_a_class_and_too_few_classes_are_refused(tmp_path):
    unlabelled = write(tmp_path / "a", x=[*images("1", "2"), ("1.cls", b"0")])
    with pytest.raises(ValueError, match=r"1 of the 2 images of .* x.tar/2.jpg: give each a KEY"):
        labelled_images(unlabelled)
    assert len(open_images(unlabelled)) == 2
    one = write(tmp_path / "b", x=[*images("1"), ("1.cls", b"4")])
    with pytest.raises(ValueError, match="images of class 4 alone"):
        labelled_images(one)
    assert labelled_images(one, fewest=1)[2] == ["0", "1", "2", "3", "4"]
    large = write(tmp_path / "c", x=[*images("1"), ("1.cls", b"2000000000")])
    with pytest.raises(ValueError, match="an image of class 2000000000"):
        labelled_images(large, fewest=1)


@pytest.mark.parametrize("told", ["names", "_info.json"])
def test_the_parts_of_a_set_are_told_apart(told, tmp_path):
    name = {"names": "imagenet1k-{}-{{:04d}}.tar", "_info.json": "{}_{{:04d}}.tar"}[told]
    parts = {"train": 2, "validation": 1}
    words = dict(
        zip(parts, ("train", "validation") if told == "names" else ("aa", "bb"), strict=True)
    )
    for part, count in parts.items():
        write_shards(tmp_path, count, 4, name=name.format(words[part]))
    if told == "_info.json":
        splits = {}
        for part, count in parts.items():
            files = [name.format(words[part]).format(number) for number in range(count)]
            splits[part] = {"name": part, "filenames": files, "shard_lengths": [4] * count}
        (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    assert "all of train, validation (pass" in describe_source(open_images(tmp_path))
    with pytest.raises(ValueError, match="shards of train, validation, which are parts") as raised:
        labelled_images(tmp_path)
    patterns = str(raised.value).rpartition("pass one of them, ")[2].split(" or ")
    assert [len(labelled_images(pattern)[0]) for pattern in patterns] == [8, 4]  # as it says


def test_shards_that_the_set_should_have_and_images_that_they_should_have_are_missed(folder):
    said = {"filenames": [f"train-000{n}.tar" for n in range(4)], "shard_lengths": [4, 5, 3, 4]}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": {"name": "train", **said}}}))
    source = open_images(folder)
    assert source.damage == {f"{folder}/train-0001.tar": "it has 4 images of the 5 that it should"}
    assert "1 shard is not there (train-0003.tar)" in source.left_out()
    assert "not there" not in open_images(f"{folder}/train-{{0000..0001}}.tar").left_out()
    for text in ("{", '{"splits": {"train": {}}}', '{"splits": {"t": {"filenames": [7]}}}'):
        (folder / "_info.json").write_text(text)
        with pytest.raises(ValueError, match=r"_info.json does not say the parts .* or remove it"):
            open_images(folder)
    for text in ("[]", '{"size": 12}'):  # of other programs
        (folder / "_info.json").write_text(text)
        assert open_images(folder).damage == {}


def test_places_without_shards_are_refused_with_what_to_do(folder, tmp_path):
    for path, said in {
        f"{tmp_path}/none/x-*.tar": "none, where the shards are to lie, is no folder: check",
        f"{folder}/val-*.tar": r"no shards like .*val-\*.tar: there are 3 shards \(train-0000",
        f"{folder}/train-{{0002..0003}}.tar": "train-0003.tar does not exist",
        f"{folder}/{{train-0000,train-0000}}.tar": "names train-0000.tar twice",
    }.items():
        with pytest.raises(ValueError, match=said):
            open_images(path)
    empty = write(tmp_path / "empty", x=[("a.txt", b"")], y=b"\x1f\x8b" + b"z" * 999)
    with pytest.raises(
        ValueError, match=r"1 other file \(1 .txt\) left out.* compressed.*unpacked"
    ):
        open_images(empty)


def test_shards_with_folders_or_images_beside_them_are_found_by_a_pattern(folder, tmp_path):
    (folder / "more").mkdir()
    with pytest.raises(ValueError, match=r"3 \.tar.* or a pattern like ") as raised:
        open_images(folder)
    pattern = str(raised.value).rpartition(" ")[2]
    assert len(open_images(pattern)) == 12  # as it says
    (folder / "a.jpg").write_bytes(picture(0))
    assert isinstance(open_images(folder), ImageFolder)


def test_shards_below_a_folder_are_found_where_the_error_says(folder):
    with pytest.raises(ValueError, match=r"3 \.tar.* or a pattern like ") as raised:
        open_images(folder.parent)
    assert len(open_images(str(raised.value).rpartition(" ")[2])) == 12


def test_archives_and_tables_beside_shards_are_told(folder):
    for name in ("train-0003.tar.gz", "train-0004.TAR.GZ", "t.parquet"):
        (folder / name).write_bytes(b"x")
    said = "3 archives or tables beside the shards (2 .gz, 1 .parquet) left out"
    assert open_images(folder).left_out() == said
    assert open_images(f"{folder}/*.tar").left_out() == ""  # which names what is meant


@pytest.mark.parametrize("target", ["nowhere", "train-0003.tar"])
def test_a_link_to_no_shard_is_a_shard_that_is_missing(target, folder):
    (folder / "train-0003.tar").symlink_to(target)
    with pytest.raises(ValueError, match=r"the shard .*train-0003.tar (does not exist|cannot be)"):
        open_images(folder)
    assert len(open_images(f"{folder}/train-000[0-2].tar")) == 12  # the others are not touched


@pytest.mark.parametrize(
    "said",
    [
        {"filenames": ["\x1b[31mx.tar"]},
        {"filenames": ["\ud800.tar"]},
        {"filenames": ["train-0000.tar"], "shard_lengths": [-4]},
    ],
)
def test_what_info_says_is_shown_only_where_it_can_be(said, folder):
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": said}}))
    with pytest.raises(ValueError, match=r"_info.json does not say the parts .*or remove it"):
        open_images(folder)
    (folder / "_info.json").unlink()  # as it says
    assert len(open_images(folder)) == 12


def test_links_to_shards_are_followed_and_hidden_shards_are_left_out(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a.tar").symlink_to(folder / "train-0000.tar")
    (linked / "._a.tar").write_bytes(b"of another system")
    source = open_images(linked)
    assert len(source) == 4
    assert decode_fast(source.read(0)).shape == (40, 60, 3)
    assert damage_of(source) == {}
