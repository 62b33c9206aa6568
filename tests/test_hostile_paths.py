"""Paths and archives made to do harm: one line that names them, and nothing happens."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from beit_fast.cli import main
from beit_fast.files import is_archive
from beit_fast.train.state import CheckpointError, load_checkpoint, save_checkpoint
from beit_fast.weights.files import read_weights
from refusals import reading, refusal, refused_in, write_good


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """`refused(arguments, *names)`: as `refused_in` says, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return refused_in(tmp_path, capsys)


def hostile_tar(path, mode):
    """Members that would be written above the folder, over others and without end."""
    with tarfile.open(path, mode) as archive:
        for name in ("../escaped.png", "/escaped.png", "a/0.png", "a/0.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"data"))
        for name, kind in (("link", tarfile.SYMTYPE), ("device", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("huge")
        member.size = 0
        archive.addfile(member)


SHARDS = ("data.path", "data.test", "train", "folder")  # where tar shards can be given


@pytest.mark.promise("S4", "R16")
@pytest.mark.parametrize(("name", "mode"), [("d.tar", "w"), ("d.tar.gz", "w:gz"), ("d", "w:xz")])
def test_an_archive_is_refused_with_what_to_do_and_nothing_is_taken_out_of_it(
    name, mode, good, refused, tmp_path
):
    path = tmp_path / name
    hostile_tar(path, mode)
    commands = reading(path, good)
    # All for one of them: the others differ by their first bytes alone.
    kinds = commands if name == "d.tar.gz" else ("images", "init", "tokenizer", "encoder")
    for kind in kinds:
        refused(commands[kind], path, "" if kind in ("config", "data.classes_file") else "unpack")


@pytest.mark.promise("S4", "R16")
def test_a_hostile_tar_is_read_as_a_shard_and_nothing_is_taken_out_of_it(good, capsys, tmp_path):
    path = tmp_path / "d.tar"
    hostile_tar(path, "w")
    said = {
        "data.path": "d.tar/a/0.png (not a JPEG",
        **dict.fromkeys(SHARDS[1:], "d.tar have no class, the first is d.tar/a/0.png"),
    }
    for kind in SHARDS:
        assert said[kind] in refusal(reading(path, good)[kind], capsys)
    beside = [".beit_fast", "d.tar"]
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "runs") == beside


@pytest.mark.promise("S4", "R16")
def test_what_torch_writes_is_no_archive(tmp_path):
    for new in (True, False):
        torch.save({"a": torch.zeros(2)}, tmp_path / "w", _use_new_zipfile_serialization=new)
        assert not is_archive((tmp_path / "w").read_bytes()[:512])


SCHEMES = ("pipe:touch ran", "http://127.0.0.1:9/x", "https://a.b/x", "file://{}", "s3://a/b")


@pytest.mark.promise("S6")
@pytest.mark.parametrize("scheme", SCHEMES, ids=[s.partition(":")[0] for s in SCHEMES])
def test_what_is_no_path_is_taken_for_one_that_is_not_there(scheme, good, refused, monkeypatch):
    def opened(*_):
        raise AssertionError("it was followed")

    for name in ("socket.getaddrinfo", "socket.socket.connect", "os.system", "subprocess.Popen"):
        monkeypatch.setattr(name, opened)
    given = scheme.format(good / "w.safetensors")
    commands = reading(given, good)
    for kind in (
        commands if scheme.startswith("file") else ("data.path", "images", "init", "config")
    ):
        refused(commands[kind], given.partition(":")[2].strip("/").partition(" ")[0])


@pytest.mark.promise("S6")
@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><script href="file:///ran"/></svg>',
        b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch/F(ran)>>>>endobj\n",
        b"\x00\x00\x01\x00\x01\x00 an icon",
    ],
    ids=["eps", "svg", "pdf", "ico"],
)
def test_kinds_that_carry_code_are_no_images_whatever_their_name(content, good, refused, tmp_path):
    for suffix in (".jpg", ".png", ".tiff"):
        path = tmp_path / f"image{suffix}"
        path.write_bytes(content)
        refused(reading(path, good)["images"], path, "not a JPEG, PNG")


@pytest.mark.promise("S7")
def test_a_nul_is_told_with_its_flag_wherever_it_stands(good, refused):
    nul = "a\0b"
    named = dict.fromkeys(("folder", "images", "checkpoint", "source"), str.upper)
    for name, command in reading(nul, good).items():
        refused(command, named.get(name, "--{}".format)(name), r"a\x00b")
    w = good / "w.safetensors"
    refused(["tokenizer", "demo", "--run.output", nul], "--run.output")
    refused(["convert", w, nul, "--to", "timm"], "TARGET")
    refused(["evaluate", w, good / "images", "--output", nul], "--output")
    refused(["probe", "digits", f"--config={nul}"], "--config")
    refused(["probe", "digits", "--statistics", nul], "--statistics")


@pytest.mark.promise("S7")
def test_long_names_and_loops_of_links_are_told_by_their_path(good, refused, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in ("n" * 300, "a/" * 3000, "loop", "loop/x"):
        commands = reading(path, good)
        for kind in commands if path == "loop" else ("data.path", "images", "source", "config"):
            refused(commands[kind], path[:60])
    refused(["tokenizer", "demo", "--run.output", "loop"], "loop", "--run.output")
    refused(["evaluate", good / "w.safetensors", good / "images", "--output", "loop/x"], "loop")


@pytest.mark.promise("S7")
def test_links_that_lead_back_end_and_those_outside_can_be_left_out(good, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(good / "images", folder)
    (folder / "red" / "up").symlink_to("..")
    (folder / "red" / "self").symlink_to(".")
    (tmp_path / "outside").mkdir()
    shutil.copy(folder / "red" / "0.png", tmp_path / "outside" / "secret.png")
    (folder / "red" / "out").symlink_to(tmp_path / "outside")
    shown = {}
    for follow in ("true", "false"):
        command = ["predict", good / "w.safetensors", folder, "--device", "cpu", "--json"]
        assert main([*map(str, command), "--follow_links", follow]) == 0
        shown[follow] = [Path(row["image"]).name for row in json.loads(capsys.readouterr().out)]
    assert len(shown["true"]) == 7
    assert "secret.png" in shown["true"]
    assert sorted(shown["false"]) == ["0.png", "0.png", "0.png", "1.png", "1.png", "1.png"]


OUTSIDE = ("../outside.safetensors", "{}/outside.safetensors", "a\0.safetensors", "x" * 300)


@pytest.mark.promise("S7")
@pytest.mark.parametrize("name", OUTSIDE, ids=["up", "absolute", "nul", "long"])
def test_what_a_manifest_or_an_index_points_at_lies_beside_it(name, tmp_path):
    name = name.format(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "outside.safetensors")
    step = save_checkpoint(tmp_path, 1, {"model": {"a": torch.zeros(2)}}, {}, keep=1)
    manifest = {"format": 1, "step": 1, "settings": {}, "files": {name: "0" * 64}}
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"step_00000001"):
        load_checkpoint(step)
    with pytest.raises(ValueError, match=r"step_00000001"):
        read_weights(step)
    folder = tmp_path / "hub"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises((ValueError, OSError), match=str(folder)):
        read_weights(folder)


@pytest.mark.promise("S7")
def test_a_name_of_a_run_that_leads_elsewhere_leads_there_and_nowhere_else(refused):
    refused(["tokenizer", "demo", "--run.output", "/proc/none/run"], "/proc/none/run")
    refused(["tokenizer", "demo", "--run.output", "../../../../../../../../proc/none"], "proc/none")
