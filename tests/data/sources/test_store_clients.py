"""Which client reads a URL, how long it may take, and that it is given no secret."""

import builtins
import json
import subprocess
import sys
import textwrap
import time

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from beit_fast.checks import has_secret
from beit_fast.cli import main
from beit_fast.data.sources.limits import READS, ReadConfig
from beit_fast.data.sources.opening import labelled_images, open_images
from beit_fast.data.sources.reading import PASSING
from beit_fast.data.sources.remote import RemoteStorage
from beit_fast.data.sources.storage import FilePart
from beit_fast.data.sources.store_clients import FSSPEC, open_client, request_limit
from object_server import serving
from refusals import reading, refused_in, write_good
from shards import picture

IMAGES = {f"set/c{number % 2}/{number}.jpg": picture(number) for number in range(6)}


class Hub(MemoryFileSystem):
    """Stands for a file system that a package brings; `opened` is how files of it were."""

    protocol, store, pseudo_dirs, opened = "hf", {}, [""], []

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("hf://").strip("/")

    def cat_file(self, path, start=None, end=None, **options):
        self.opened.append(options)
        return super().cat_file(path, start, end)


def good_folder(tmp_path):
    (tmp_path / "good").mkdir()
    return tmp_path / "good"


@pytest.fixture
def hub(monkeypatch):
    """Has IMAGES at hf://datasets."""
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    Hub.opened.clear()
    Hub.store.clear()
    for key, data in IMAGES.items():
        Hub().pipe(f"/datasets/{key}", data)


def test_fsspec_reads_what_obstore_does_not(hub):
    images, labels, classes = labelled_images("hf://datasets/set")
    assert [images.key(number) for number in range(6)] == sorted(
        key.removeprefix("set/") for key in IMAGES
    )
    assert [images.read(number) for number in range(6)] == [
        IMAGES[f"set/{images.key(number)}"] for number in range(6)
    ]
    assert (labels.tolist(), classes) == ([0, 0, 0, 1, 1, 1], ["c0", "c1"])
    storage = RemoteStorage("hf://datasets/set")
    data = IMAGES["set/c0/0.jpg"]
    assert storage.read(FilePart("c0/0.jpg", 5, 9)) == data[5:14]
    assert storage.state("c0/0.jpg").size == len(data)
    with pytest.raises(OSError, match="9 of 5000 bytes") as caught:
        storage.read(FilePart("c0/0.jpg", len(data) - 9, 5000))
    assert caught.value.errno in PASSING
    with pytest.raises(FileNotFoundError, match=r"hf://datasets/set/none.jpg"):
        storage.read(FilePart("none.jpg", 0, 5))
    # Else the hub's own client reads megabytes for each part.
    assert Hub.opened == [{"cache_type": "none"}] * 9


@pytest.mark.promise("S6")
@pytest.mark.parametrize("scheme", ["file", "local", "pipe", "memory", "data", "github", "zip"])
def test_schemes_of_this_machine_and_of_what_runs_programs_are_refused(scheme):
    for path in (f"{scheme}://{__file__}", f"{scheme}:///etc/a.tar", f"{scheme}://a/x.txt"):
        with pytest.raises(ValueError, match=rf"images are not read from {scheme}://: give a path"):
            open_images(path)


def test_a_client_that_is_not_there_is_named_with_its_extra(monkeypatch):
    load = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] in ("obstore", "fsspec"):
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for url, package in (("s3://b/a", "obstore"), ("sftp://b/a", "fsspec")):
        with pytest.raises(ValueError, match=rf'{package}: pip install "beit_fast\[cloud\]"'):
            open_client(url, READS)


def test_a_package_that_a_scheme_needs_besides_is_named():
    assert "smb" in FSSPEC
    with pytest.raises(ValueError, match=r"smb://h/a needs one more package .*smbprotocol"):
        open_client("smb://h/a", READS)


def test_what_the_environment_lacks_is_said(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ValueError, match=r"az://b/a cannot be opened .*Account must be specified"):
        open_client("az://b/a", READS)


def test_a_web_server_may_send_elsewhere(monkeypatch):
    with serving(dict(IMAGES) | {"l.txt": b"a.jpg"}) as server:
        server.meets("a.jpg", f"to {server.url}/set/c0/0.jpg")
        assert open_images(f"{server.url}/l.txt").read(0) == IMAGES["set/c0/0.jpg"]


def test_a_server_that_sends_no_parts_is_told(monkeypatch):
    with serving(dict(IMAGES)) as server:
        server.always("set/c0/0.jpg", "whole")
        storage = RemoteStorage(f"{server.url}/set")
        with pytest.raises(OSError, match="sends no parts of files") as caught:
            storage.read(FilePart("c0/0.jpg", 5, 9))
        assert caught.value.errno not in PASSING
        assert storage.read(FilePart("c0/0.jpg", 0, -1)) == IMAGES["set/c0/0.jpg"]


@pytest.mark.promise("R17")
def test_all_tries_of_a_client_take_half_the_time_of_a_read():
    reads = ReadConfig(read_timeout=1.0, read_retries=0)
    assert request_limit(reads) == 0.25
    with serving(dict(IMAGES)) as server:
        storage = RemoteStorage(f"{server.url}/set", reads=reads)
        for fault in ("hang", "500", "slow"):
            server.always("set/c0/0.jpg", fault)
            start = time.monotonic()
            with pytest.raises(OSError, match=r"timed out|answers 500"):
                storage.read(FilePart("c0/0.jpg", 5, 99))
            assert time.monotonic() - start < 0.75
        storage.close()


CHILD = """
    import sys
    from beit_fast.data.sources.in_flight import InFlight
    from beit_fast.data.sources.limits import READS
    from beit_fast.data.sources.storage import FilePart
    from beit_fast.data.sources.store_clients import open_client
    client = open_client(sys.argv[1], READS)
    flights = InFlight(lambda part: client.read(part.name, part.first, 5, 5), 60)
    flights.ask([FilePart("a.jpg", first, 5) for first in range(64)])
    input()
"""


@pytest.mark.promise("R17")
def test_a_process_ends_while_a_store_keeps_it_waiting():
    with serving({"a.jpg": bytes(100)}) as server:
        server.always("a.jpg", "hang")
        command = [sys.executable, "-c", textwrap.dedent(CHILD), server.url]
        pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, **pipes) as process:
            while server.count("a.jpg") < 64:
                assert process.poll() is None
                time.sleep(0.01)
            start = time.monotonic()
            _, said = process.communicate("\n", timeout=20)
        assert (process.returncode, said) == (0, "")
        assert time.monotonic() - start < 5


SECRETS = (
    "https://me:hunter2@host/a-{0..1}.tar",
    "s3://AKIA:hunter2@bucket/a",
    "https://hunter2@host/a",
    "https://account.blob.core.windows.net/c/a.tar?sv=2024&sig=hunter2",
    "https://host/a.tar?hunter2",
    "abfs://me:hunter2@account.dfs.core.windows.net/a",
)


@pytest.mark.promise("S9")
@pytest.mark.parametrize("url", SECRETS)
def test_a_url_with_a_secret_is_refused_and_not_shown(url, tmp_path, capsys, monkeypatch):
    assert has_secret(url)
    monkeypatch.chdir(tmp_path)
    good = write_good(good_folder(tmp_path))
    commands = reading(url, good)
    for kind in ("data.path", "data.test", "train", "folder"):
        if kind != "data.path" and url != SECRETS[0]:
            continue
        assert main([str(argument) for argument in commands[kind]]) in (1, 2)
        said = capsys.readouterr()
        assert "hunter2" not in said.out + said.err
        assert "credentials come from the environment" in said.err
    for path in (url, url.partition("?")[0]):
        if has_secret(path):
            with pytest.raises(ValueError, match="credentials come from the env") as caught:
                open_images(path)
            assert "hunter2" not in str(caught.value)
    assert not any("hunter2" in path.read_text() for path in tmp_path.rglob("*.yaml"))


@pytest.mark.parametrize(
    "url",
    [
        *("s3://bucket/a", "abfs://container@account.dfs.core.windows.net/a", "a@b:c?d=e"),
        *("s3://b/train-????.tar", "https://h/a@b.tar", "/data/a?b=c", "photographs"),
    ],
)
def test_a_url_without_one_is_none(url):
    assert not has_secret(url)
    assert ReadConfig(cache=url).cache == url


def test_a_store_that_is_not_there_ends_a_command_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write_good(good_folder(tmp_path))
    refused = refused_in(tmp_path, capsys)
    for url, said in (("http://127.0.0.1:9/x", "does not list"), ("file:///etc", "file://")):
        for kind in ("data.path", "folder"):
            refused(reading(url, good)[kind], url, said)


def test_a_command_reads_a_store_as_it_reads_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write_good(good_folder(tmp_path))
    images = good / "images"
    objects = {f"i/{p.relative_to(images)}": p.read_bytes() for p in images.rglob("*.png")}
    said = []
    with serving(objects) as server:
        for name, value in server.s3().items():
            monkeypatch.setenv(name, value)
        for path in (str(images), "s3://bucket/i"):
            output = tmp_path / f"{len(said)}.json"
            command = ["evaluate", good / "w.safetensors", path, "--device", "cpu"]
            assert main([*map(str, command), "--output", str(output)]) == 0
            assert f"{path}: 6 images, 3 classes" in capsys.readouterr().out
            said.append(json.loads(output.read_text()))
        assert [server.count(key) for key in objects] == [1] * len(objects)
    assert said[1]["folder"] == "s3://bucket/i"
    assert {key for key in said[0] if said[0][key] != said[1][key]} <= {
        "folder",
        "images_per_second",
    }
    assert said[0].keys() == said[1].keys()
