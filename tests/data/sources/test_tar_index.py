import hashlib
import json
import random
import resource
import tarfile

import numpy as np
import pytest

from beit_fast.data.sources import tar_index
from beit_fast.data.sources.storage import FileState
from beit_fast.data.sources.tar_index import NO_LABEL, from_bytes, index_shard, to_bytes
from shards import entry, write_tar

SHARD = "train-0000.tar"


def indexed(content, **options):
    return index_of(write_tar(content, **options))


def index_of(data):
    state = FileState(len(data), "7")
    return index_shard(SHARD, state, lambda first, count: data[first : first + count])


def names(index):
    return [index.name(number).decode() for number in range(len(index))]


def test_images_have_their_names_places_and_labels():
    content = [
        ("a.cls", b"3\n"),
        ("a.jpg", b"A" * 700),
        ("a.json", b'{"label": 5}'),
        ("b.json", b'{"label": 1, "width": 9}'),
        ("./b.PNG", b"B"),
        ("c/7.left.jpg", b"left"),
        ("c/7.right.webp", b"right"),
        ("c/7.cls", b"2"),
        ("v1.0001.jpg", b"x"),
        ("v1.0001.cls", b"8"),
        ("v1.0002.jpg", b"y"),
        ("v1.0002.cls", b"9"),
        ("d.jpg", b""),
    ]
    index = indexed(content)
    images = ["a.jpg", "b.PNG", "c/7.left.jpg", "c/7.right.webp", "v1.0001.jpg", "v1.0002.jpg"]
    assert names(index) == [*images, "d.jpg"]
    assert index.label.tolist() == [3, 1, 2, 2, 8, 9, NO_LABEL]
    data = write_tar(content)
    bodies = [data[f : f + n] for f, n in zip(index.first, index.size, strict=True)]
    assert bodies == [b"A" * 700, b"B", b"left", b"right", b"x", b"y", b""]
    assert (index.damage, index.left, index.endings) == ("", {}, {})


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        *[("cls", text) for text in (b"", b"-1", b"cat", b"1.5", b"9" * 10, b"9" * 70000, b"\xff")],
        *[
            ("json", text)
            for text in (b"", b"[]", b'{"label": true}', b'{"label": "1"}', b"[" * 9999)
        ],
    ],
)
def test_what_is_no_number_of_a_class_is_no_label(ending, text):
    index = indexed([("a.jpg", b"x"), (f"a.{ending}", text)])
    assert index.label.tolist() == [NO_LABEL]


HOSTILE = [
    ("../up.jpg", b"x"),
    ("/absolute.jpg", b"x"),
    ("a/../../up.jpg", b"x"),
    ("..\\up.jpg", b"x"),
    ("", b"x"),
    (entry("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
    (entry("hard.jpg", tarfile.LNKTYPE, "whole.jpg"), b""),
    (entry("device.jpg", tarfile.CHRTYPE), b""),
    (entry("pipe.jpg", tarfile.FIFOTYPE), b""),
    (entry("folder.jpg", tarfile.DIRTYPE), b""),
    ("._whole.jpg", b"x"),
    ("whole.jpg", b"first"),
    ("whole.jpg", b"second"),
    ("code.pkl", b"cos\nsystem\n"),
    ("code.pt", b"PK"),
    ("code.pyd", b"MZ"),
    ("code", b"#!"),
]


@pytest.mark.promise("S4", "S6")
def test_members_made_to_do_harm_are_left_out_and_counted(monkeypatch):
    monkeypatch.setattr(tar_index, "MOST_IMAGE_BYTES", 100)
    data = write_tar([*HOSTILE, ("large.jpg", b"x" * 101)])
    read = []

    def reading(first, count):
        read.append((first, count))
        return data[first : first + count]

    index = index_shard(SHARD, FileState(len(data), ""), reading)
    assert names(index) == ["whole.jpg"]
    assert data[index.first[0] :][:5] == b"first"
    assert index.left == {"stray": 5, "links": 4, "hidden": 1, "twice": 1, "large": 1}
    assert index.endings == {".pkl": 1, ".pt": 1, ".pyd": 1, "without ending": 1}
    bodies = {first for first, count in read if count != 512}
    assert len(bodies) == 1  # the row of zeros at the end: of no member the content


@pytest.mark.promise("S4")
def test_a_hundred_thousand_members_are_indexed_within_300_mib():
    header = write_tar([("0000000.jpg", b"")])[:512]
    total = int(header[148:154], 8) - 7 * ord("0")
    data = bytearray(header * 100_000)
    for number in range(100_000):
        name, first = b"%07d" % number, number * 512
        data[first : first + 7] = name
        data[first + 148 : first + 154] = b"%06o" % (total + sum(name))
    data = bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = index_of(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert len(index) == 100_000
    assert names(index)[-1] == "0099999.jpg"


def test_a_shard_of_more_members_than_are_taken_is_used_up_to_there(monkeypatch):
    monkeypatch.setattr(tar_index, "MOST_MEMBERS", 2)
    index = indexed([("a.jpg", b""), ("b.jpg", b""), ("c.jpg", b"")])
    assert names(index) == ["a.jpg", "b.jpg"]
    assert index.damage == "it has more than 2 members"


CONTENT = [(f"{n}.{end}", b"7" * (n + 1)) for n in range(9) for end in ("jpg", "cls", "pt")]
INDEX = indexed(CONTENT)
KEPT = to_bytes(INDEX)


def test_an_index_is_read_as_it_was_kept():
    again = from_bytes(KEPT, SHARD, INDEX.state)
    for name in ("first", "size", "check", "label", "ends"):
        assert getattr(again, name).tolist() == getattr(INDEX, name).tolist()
    assert again.names == INDEX.names
    assert (again.damage, again.left, again.endings) == ("", {}, {".pt": 9})
    cut = index_of(write_tar(CONTENT)[:5000])
    assert cut.damage
    assert from_bytes(to_bytes(cut), SHARD, cut.state).damage == cut.damage
    empty = index_of(b"")
    assert len(from_bytes(to_bytes(empty), SHARD, empty.state)) == 0


@pytest.mark.promise("R16")
def test_an_index_that_was_cut_or_flipped_or_is_of_something_else_is_none():
    chance = random.Random(0)
    for size in range(0, len(KEPT), 7):
        assert from_bytes(KEPT[:size], SHARD, INDEX.state) is None
    for _ in range(200):
        data = bytearray(KEPT)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        assert from_bytes(bytes(data), SHARD, INDEX.state) is None
    assert from_bytes(KEPT, "train-0001.tar", INDEX.state) is None
    assert from_bytes(KEPT, SHARD, INDEX.state._replace(tag="8")) is None
    assert from_bytes(KEPT, SHARD, INDEX.state._replace(size=9)) is None


def forged(header=None, names=None, **columns):
    """The index with other content, and a digest that fits."""
    said, _, _ = KEPT.partition(b"\n")
    said = json.loads(said) | (header or {})
    arrays = []
    for name, kind in (("first", "<i8"), ("size", "<i4"), ("check", "<u4"), ("label", "<i4")):
        array = getattr(INDEX, name).astype(kind)
        for place, value in columns.get(name, {}).items():
            array[place] = value
        arrays.append(array.tobytes())
    content = json.dumps(said).encode() + b"\n" + b"".join(arrays)
    content += INDEX.names if names is None else names
    return content + hashlib.sha256(content).digest()


FORGED = {
    "beyond the shard": {"first": {8: 10**6}},
    "far beyond the shard": {"first": {4: 2**63 - 1}},
    "before the shard": {"first": {0: 0}},
    "negative": {"first": {3: -512}},
    "backwards": {"first": {4: 1024}},
    "over the next": {"size": {2: 3000}},
    "longer than the shard": {"size": {8: 60_000}},
    "of a size below none": {"size": {0: -1}},
    "of more than an image has": {"size": {0: 2**31 - 1}},
    "of no class": {"label": {0: -2}},
    "with other counts": {"header": {"count": 8}},
    "with a count below none": {"header": {"count": -1}},
    "with a count of no kind": {"header": {"count": "9"}},
    "with a count without end": {"header": {"count": 2**62}},
    "with too few names": {"names": INDEX.names[:-6]},
    "with an empty name": {"names": INDEX.names.replace(b"0.jpg", b"")},
    "with a name without end": {"names": INDEX.names[:-1] + b"x"},
    "with damage of no kind": {"header": {"damage": 7}},
    "with members of no number": {"header": {"left": {"links": "b"}}},
    "with members of no kind": {"header": {"left": {"a": 1}}},
    "with nothing left out": {"header": {"left": None}},
    "of another format": {"header": {"format": 2}},
}


@pytest.mark.promise("R16")
@pytest.mark.parametrize("case", FORGED)
def test_an_index_that_says_what_cannot_be_is_none_though_its_digest_fits(case):
    assert from_bytes(forged(), SHARD, INDEX.state) is not None
    assert from_bytes(forged(**FORGED[case]), SHARD, INDEX.state) is None


def test_what_an_index_takes_in_memory_is_small():
    index = from_bytes(KEPT, SHARD, INDEX.state)
    arrays = [getattr(index, name) for name in ("first", "size", "check", "label", "ends")]
    assert all(isinstance(array, np.ndarray) for array in arrays)
    assert sum(array.itemsize for array in arrays) == 28  # bytes an image, and its name
