"""Images in a store on loopback: what they are, and that none is lost or comes twice."""

import errno
import logging
import os
import threading
import time

import pytest
import torch

from beit_fast.data.loader import Loader
from beit_fast.data.sources import reading, remote
from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.folder import ImageFolder, read_ahead
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.object_folder import ObjectFolder
from beit_fast.data.sources.opening import labelled_images, open_images
from loaded import SAMPLE
from object_server import serving
from shards import picture, write_shards

pytestmark = pytest.mark.promise("R17")
IMAGES = {f"set/c{number % 3}/{number:02}.jpg": picture(number) for number in range(24)}
ODD = ("a b.jpg", "é%20+.jpg", "#?.jpg", "~&='.JPG")


@pytest.fixture
def server(monkeypatch):
    """Serves IMAGES as the bucket of s3://bucket, and by HTTP."""
    monkeypatch.setattr(reading, "_PAUSE", 0.01)
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    with serving(dict(IMAGES), page=7) as server:
        for name, value in server.s3().items():
            monkeypatch.setenv(name, value)
        yield server
    until_gone = time.monotonic() + 5
    for thread in threading.enumerate():
        if thread.name == "beit_fast read":
            thread.join(max(0, until_gone - time.monotonic()))


def read_all(source, reads=READS):
    with reading.Reads(source, reads) as guarded:
        return [guarded.run(lambda read, i=i: read(i)) for i in range(len(source))]


def written(folder, objects=IMAGES):
    for key, data in objects.items():
        path = folder / key.removeprefix("set/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def test_a_prefix_is_a_folder_with_the_same_names_sizes_digest_and_classes(server, tmp_path):
    server.objects |= {"set/readme.md": b"x", "set/.hidden/a.jpg": b"x", "other/a.jpg": b"x"}
    server.objects |= {f"set/c0/{name}": picture(7) for name in ODD}
    folder = ImageFolder(
        written(tmp_path, {k: v for k, v in server.objects.items() if "set/" in k})
    )
    ours = open_images("s3://bucket/set")
    numbers = range(len(folder))
    assert len(ours) == len(folder) == 24 + len(ODD)
    for ask in ("key", "size", "read"):
        assert [getattr(ours, ask)(i) for i in numbers] == [
            getattr(folder, ask)(i) for i in numbers
        ]
    assert ours.name(0) == "s3://bucket/set/c0/#?.jpg"
    assert ours.digest() == folder.digest()
    assert (
        ours.left_out()
        == folder.found.left_out()
        == ("1 other file (1 .md), 1 hidden name left out")
    )
    source, labels, classes = labelled_images("s3://bucket/set/")
    theirs = labelled_images(tmp_path)
    assert torch.equal(labels, theirs[1])
    assert classes == theirs[2]
    assert [source.key(i) for i in numbers] == [folder.key(i) for i in numbers]


def test_a_web_server_has_what_a_text_file_names(server, tmp_path):
    names = [key.removeprefix("set/") for key in IMAGES]
    server.objects["set/all.txt"] = "\ufeff{}\n\n c0/no.avif \r\n".format("\n".join(names)).encode()
    ours, folder = open_images(f"{server.url}/set/all.txt"), ImageFolder(written(tmp_path))
    assert [ours.key(i) for i in range(24)] == sorted(names)
    assert ours.left_out() == "1 other file (1 .avif) left out"
    assert ours.digest() == folder.digest()
    assert ours.size(3) == folder.size(3)
    assert read_all(ours) == read_all(folder)
    assert ours.path == f"{server.url}/set/all.txt"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("a.jpg\n../b.jpg", "line 2: '../b.jpg' is no name"),
        ("/etc/passwd.jpg", "line 1: .* is no name"),
        ("http://127.0.0.1:9/a.jpg", "line 1: .* is no name"),
        ("a//b.jpg", "is no name"),
        ("a.jpg\nb.jpg\na.jpg", "line 3: 'a.jpg' stands in line 1 already"),
        ("readme.md", "no images at .*expected objects whose names end in"),
        (b"\xff\xfea", "is no text in UTF-8"),
    ],
)
def test_a_list_that_is_none_is_refused_with_its_line(lines, said, server):
    server.objects["x.txt"] = lines if isinstance(lines, bytes) else lines.encode()
    with pytest.raises(ValueError, match=said):
        open_images(f"{server.url}/x.txt")


def test_what_cannot_be_listed_says_what_to_give(server):
    with pytest.raises(
        ValueError, match=r"does not list its files.*train-\{0000..1023\}.tar.*.txt"
    ):
        open_images(f"{server.url}/set")
    with pytest.raises(ValueError, match="no images at s3://bucket/none"):
        open_images("s3://bucket/none")
    with pytest.raises(ValueError, match=r"x.txt cannot be read .No such file"):
        open_images(f"{server.url}/x.txt")
    with pytest.raises(ValueError, match=r"without stars, such as .*/set/train-\{0000..1023\}.tar"):
        open_images(f"{server.url}/set/train-*.tar")
    for nothing in ("s3://", "s3:///"):
        with pytest.raises(ValueError, match="names no bucket and no host: write one behind ://"):
            open_images(nothing)
    server.always("?", "403")
    with pytest.raises(ValueError, match=r"cannot be listed .the store answers 403 Told: credent"):
        open_images("s3://bucket/set")


FAULTS = ("500", "503", "429", "reset", "cut", "short")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_image_comes_once_whatever_the_store_does_meanwhile(fault, server, caplog):
    ours = open_images("s3://bucket/set")
    for key in list(IMAGES)[::3]:
        server.meets(key, fault)
    read_ahead(ours, range(24))
    with caplog.at_level(logging.WARNING):
        assert read_all(ours) == [IMAGES[f"set/{ours.key(i)}"] for i in range(24)]
    met = [key for key in IMAGES if server.count(key) == 2]
    assert met == list(IMAGES)[::3]
    assert sum(server.count(key) for key in IMAGES) == 32


def test_what_a_store_refuses_for_good_is_a_bad_file_with_its_reason(server):
    ours = open_images("s3://bucket/set")
    bad = {"set/c0/00.jpg": "404", "set/c1/01.jpg": "403", "set/c2/02.jpg": "400"}
    for key, fault in bad.items():
        server.always(key, fault)
    loader = Loader(ours, SAMPLE, batch_size=8, num_threads=2, max_bad_share=0.5)
    batches = loader.batches()
    seen = torch.cat([next(batches)["sample_index"] for _ in range(3)])
    batches.close()
    assert loader.bad_samples == {
        "s3://bucket/set/c0/00.jpg": "[Errno 2] No such file or directory: 's3://bucket/set/c0/00.jpg'",
        "s3://bucket/set/c1/01.jpg": "[Errno 13] the store answers 403 Told: credentials come from "
        "the environment of the store's client: 's3://bucket/set/c1/01.jpg'",
        "s3://bucket/set/c2/02.jpg": "[Errno 22] the store answers 400 Told: 's3://bucket/set/c2/02.jpg'",
    }
    assert {ours.key(i) for i in seen}.isdisjoint(key.removeprefix("set/") for key in bad)


@pytest.mark.parametrize("fault", ["hang", "slow"])
def test_a_store_that_is_silent_is_asked_again_within_the_time_of_a_read(fault, server):
    ours = open_images("s3://bucket/set", reads=ReadConfig(read_timeout=1.2))
    server.meets("set/c0/00.jpg", fault)
    read_ahead(ours, range(24))
    start = time.monotonic()
    assert read_all(ours, ReadConfig(read_timeout=1.2))[0] == IMAGES["set/c0/00.jpg"]
    assert 0.25 < time.monotonic() - start < 1.2


def test_one_that_stays_silent_is_a_bad_file_in_time(server):
    reads = ReadConfig(read_timeout=0.6, read_retries=1)
    ours = open_images("s3://bucket/set", reads=reads)
    server.always("set/c0/00.jpg", "hang")
    start = time.monotonic()
    with (
        reading.Reads(ours, reads) as guarded,
        pytest.raises(OSError, match=r"timed out|no answer"),
    ):
        guarded.run(lambda read: read(0))
    assert time.monotonic() - start < 1.0


def test_a_batch_waits_for_one_answer_and_not_for_each(server):
    server.latency = 0.1
    ours = open_images("s3://bucket/set")
    start = time.monotonic()
    read_ahead(ours, range(24))
    assert read_all(ours) == [IMAGES[f"set/{ours.key(i)}"] for i in range(24)]
    assert time.monotonic() - start < 1.0  # one after the other take 2.4 s
    assert server.most_in_flight >= 20


def test_the_loader_reads_the_same_batches_as_from_a_folder(server, tmp_path):
    ours, folder = open_images("s3://bucket/set"), ImageFolder(written(tmp_path))
    server.latency, got = 0.02, []
    for source in (ours, folder):
        batches = Loader(source, SAMPLE, batch_size=5, num_threads=3).batches(start=2)
        got.append([next(batches) for _ in range(6)])
        batches.close()
    for a, b in zip(*got, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert server.most_in_flight > 1


def test_an_object_that_changed_or_is_too_large_is_no_image(server, monkeypatch):
    ours = open_images("s3://bucket/set")
    server.objects["set/c0/00.jpg"] += b"more"
    with pytest.raises(OSError, match="bytes came"):
        ours.read(0)
    server.objects["set/c0/00.jpg"] = IMAGES["set/c0/00.jpg"]
    monkeypatch.setattr("beit_fast.data.sources.object_folder.MAX_FILE_BYTES", 100)
    with pytest.raises(BadImageError, match="more than 100"):
        ours.read(0)
    server.objects["x.txt"] = b"set/c0/00.jpg"
    monkeypatch.setattr("beit_fast.data.sources.remote.MAX_FILE_BYTES", 100)
    with pytest.raises(OSError, match="File too large") as caught:
        ObjectFolder(f"{server.url}/x.txt").read(0)
    assert caught.value.errno == errno.EFBIG


def test_the_secret_is_used_and_shown_nowhere(server, caplog, capsys):
    server.always("set/c0/00.jpg", "403")
    with caplog.at_level(logging.DEBUG):
        ours = open_images("s3://bucket/set")
        with pytest.raises(OSError, match="403") as caught:
            ours.read(0)
    assert any("KEYOFTHETEST" in head["authorization"] for head in server.headers)
    said = f"{caught.getrepr(chain=True)}{caplog.text}{capsys.readouterr()}{vars(ours)}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name] not in said


def test_a_class_label_is_the_folder_and_images_outside_are_refused(server):
    server.objects = {"a.jpg": b"x", "b/c.jpg": b"x"}
    with pytest.raises(ValueError, match=r"a.jpg lies in s3://bucket/ and in no class folder"):
        labelled_images("s3://bucket/")
    server.objects = {"s/train/x/a.jpg": b"x", "s/train/y/b.jpg": b"", "s/val/x/c.jpg": b""}
    with pytest.raises(ValueError, match="pass s3://bucket/s/train or s3://bucket/s/val"):
        labelled_images("s3://bucket/s")
    server.objects = {"s/one/x/a.jpg": b"x", "s/one/y/b.jpg": b""}
    with pytest.raises(ValueError, match="teaches nothing: pass s3://bucket/s/one if its 2 fold"):
        labelled_images("s3://bucket/s")


def test_a_list_of_several_parts_of_a_set_names_what_to_give(server):
    names = [f"{part}/{name}/0.jpg" for part in ("train", "val") for name in ("ant", "bee")]
    server.objects |= {f"parts/{name}": picture(number) for number, name in enumerate(names)}
    server.objects["parts/all.txt"] = "\n".join(names).encode()
    with pytest.raises(ValueError, match=r"and not like classes: pass .* by a list") as raised:
        labelled_images(f"{server.url}/parts/all.txt")
    one = f"{server.url}/parts/train"
    assert f"pass {one} or " in str(raised.value)
    server.objects["parts/train/names.txt"] = b"ant/0.jpg\nbee/0.jpg"
    assert labelled_images(f"{one}/names.txt")[2] == ["ant", "bee"]  # as it says


def test_a_store_that_may_not_be_listed_has_no_files_beside_its_shards(server, tmp_path):
    """It answers 403 where there is nothing."""
    write_shards(tmp_path, 2, 3)
    server.objects |= {f"set/{path.name}": path.read_bytes() for path in tmp_path.glob("*.tar")}
    for name in ("_info.json", "info.json", "classes.txt", "classes.json"):
        server.always(f"set/{name}", "403")
    pattern, reads = "set/train-{0000..0001}.tar", ReadConfig(cache=str(tmp_path))
    for url in (f"{server.url}/{pattern}", f"s3://bucket/{pattern}"):
        assert labelled_images(url, reads=reads)[2] == ["0", "1", "2"]
    server.always("set/train-0001.tar", "403")
    with pytest.raises(ValueError, match=r"the shard .*train-0001.tar cannot be read .*403"):
        open_images(f"{server.url}/{pattern}", reads=reads)
