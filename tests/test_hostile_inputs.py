"""Paths, archives and texts made to do harm: one line that names them, soon, and nothing happens."""

import io
import json
import os
import re
import shutil
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from beit_fast.cli import main
from beit_fast.data.token_cache import MANIFEST, TokenCacheError, read_manifest
from beit_fast.files import is_archive
from beit_fast.tasks.probe.features import _open as open_features
from beit_fast.tokenizer.checkpoint import load_tokenizer, save_tokenizer
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.train.state import CheckpointError, load_checkpoint, save_checkpoint
from beit_fast.weights.files import read_weights, write_weights
from beit_fast.weights.save import save_pretrained
from labelled_images import write_class_folders
from tiny_classifier import TINY_CLASSIFIER, tiny_classifier


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What is right in every respect but the one that a test makes wrong."""
    root = tmp_path_factory.mktemp("good")
    model = tiny_classifier(replace(TINY_CLASSIFIER, num_classes=3))
    write_weights(root / "w.safetensors", model.state_dict())
    save_pretrained(model, root / "hub", labels=["blue", "green", "red"], statistics="half")
    write_class_folders(root / "images", 2, seed=0)
    (root / "masks").mkdir()
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(root / "masks" / "0.png")
    return root


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """`refused(arguments, *names)`: one line within a second, with the names, and no new file."""
    monkeypatch.chdir(tmp_path)

    def check(arguments, *names):
        before = sorted(tmp_path.rglob("*"))
        begun = time.process_time()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        seconds = time.process_time() - begun
        said = capsys.readouterr()
        lines = [x for x in said.err.splitlines() if not re.match(r"WARNING|.*: \d+ images?\b", x)]
        assert code in (1, 2), said
        assert len(lines) == 1, lines
        assert lines[0].startswith("beit-fast: ")
        assert len(lines[0]) < 900
        for name in names:
            assert str(name) in lines[0]
        assert "Traceback" not in said.out + said.err
        assert sorted(p for p in tmp_path.rglob("*") if "runs" not in p.parts) == before
        return seconds

    return check


def reading(path, good):
    """Commands that read `path`, by what it is given as."""
    cpu, alone = ["--run.device", "cpu"], ["--tokenizer_training", "null"]
    w, images = good / "w.safetensors", good / "images"
    masks = ["--data.masks", good / "masks", "--data.test_masks", good / "masks"]
    return {
        "data.path": ["tokenizer", "demo", "--data.path", path, *cpu],
        "data.test": ["finetune", "digits", "--init", "null", "--data.test", path, *cpu],
        "train": ["probe", "digits", "--checkpoint", w, "--train", path, "--device", "cpu"],
        "folder": ["evaluate", w, path, "--device", "cpu"],
        "images": ["predict", w, path, "--device", "cpu"],
        "init": ["finetune", "digits", "--init", path, *cpu],
        "checkpoint": ["predict", path, images / "red", "--device", "cpu"],
        "source": ["convert", path, "out.pth", "--to", "timm"],
        "tokenizer": ["pretrain", "demo", "--tokenizer", path, *alone, *cpu],
        "token_cache": [
            *["pretrain", "demo", "--tokenizer", "null", "--token_cache", path, *alone, *cpu],
        ],
        "encoder": ["convert-dalle", "--encoder", path, "--decoder", path, "--output", "out"],
        "classes_file": [
            *["segment", "digits", "--init", "null", *cpu, "--data.path", images, *masks],
            *["--data.classes_file", path],
        ],
        "config": ["probe", "digits", "--config", path],
    }


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


@pytest.mark.promise("S4", "R16")
@pytest.mark.parametrize(("name", "mode"), [("d.tar", "w"), ("d.tar.gz", "w:gz"), ("d", "w:xz")])
def test_an_archive_is_refused_with_what_to_do_and_nothing_is_taken_out_of_it(
    name, mode, good, refused, tmp_path
):
    path = tmp_path / name
    hostile_tar(path, mode)
    for kind, command in reading(path, good).items():
        refused(command, path, "" if kind in ("config", "classes_file") else "unpack")
    (tmp_path / "shards").mkdir()
    path.rename(tmp_path / "shards" / "0.tar")
    for kind in ("data.path", "folder", "images"):
        refused(reading(tmp_path / "shards", good)[kind], "3 .tar" if 0 else ".tar", "unpacked first")


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
    for command in reading(given, good).values():
        refused(command, given.partition(":")[2].strip("/").partition(" ")[0])


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
    flags = {"folder": "FOLDER", "images": "IMAGES", "checkpoint": "CHECKPOINT", "source": "SOURCE"}
    for name, command in reading(nul, good).items():
        refused(command, flags.get(name, f"--{name}"), r"a\x00b")
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
        for name, command in reading(path, good).items():
            if len(path) < 400:
                refused(command, path.rstrip("/"))
            else:
                with pytest.raises(AssertionError, match="< 900"):  # but for the length, which is
                    refused(command)  # that of the path
            assert name
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
        shown[follow] = [Path(row["file"]).name for row in json.loads(capsys.readouterr().out)]
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
    with pytest.raises((ValueError, OSError), match=r"index\.json"):
        read_weights(folder)


@pytest.mark.promise("S7")
def test_a_name_of_a_run_that_leads_elsewhere_leads_there_and_nowhere_else(refused):
    refused(["tokenizer", "demo", "--run.output", "/proc/none/run"], "/proc/none/run")
    refused(["tokenizer", "demo", "--run.output", "../../../../../../../../proc/none"], "proc/none")


LAUGHS = "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'ha'] * 9)}]\n" for n in range(9)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)
)
UNBOUNDED = {
    "laughs": LAUGHS,
    "a field": f"{LAUGHS}knn: *a8\n",
    "merges": MERGES,
    "in a text": f"rates: [{json.dumps(LAUGHS)}]\n",
    "in itself": "rates: &a [*a]\n",
    "in itself by name": "rates: &a {b: *a}\n",
    "a chain": "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000)),
    "deep": "rates: " + "[" * 500 + "]" * 500,
    "deeper": "rates: " + "[" * 100_000 + "]" * 100_000,
    "deep maps": "{a: " * 100_000,
    "deep blocks": "- " * 100_000,
    "long": f"rates: [{'1, ' * 20_000}1]",
}


@pytest.mark.promise("S8")
@pytest.mark.parametrize("text", UNBOUNDED.values(), ids=UNBOUNDED)
def test_yaml_that_unfolds_without_end_is_refused_before_it_does(text, refused, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert refused(["probe", "digits", "--config", path], f"--config {path}") < 1
    assert refused(["probe", "digits", "--rates", text], "--rates") < 1
    assert refused(["tokenizer", "demo", "--optim", path], "--optim", path) < 1


@pytest.mark.promise("S8")
def test_aliases_that_unfold_to_little_are_what_they_say(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("knn: &k [5, 7]\nrates: [&r 0.1, *r]\nnum_threads: 1\n")
    assert main(["probe", "digits", "--config", str(path), "--print_config"]) == 0
    said = capsys.readouterr().out
    assert "- 5\n- 7\n" in said
    assert "- 0.1\n- 0.1\n" in said


@pytest.mark.promise("S8")
@pytest.mark.parametrize(
    "value",
    [
        "__import__('os').mkdir('ran')",
        "$HOME",
        "${HOME}",
        "${oc.env:HOME}",
        "~/x",
        "{{7*7}}",
        "`mkdir ran`",
        "$(mkdir ran)",
        "%(asctime)s",
        "!!python/name:os.system",
    ],
)
def test_a_value_is_what_it_says(value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(f"output: {json.dumps(value)}\n")
    for given in (["--output", value], ["--config", "c.yaml"]):
        assert main(["probe", "digits", *given, "--print_config"]) == 0
        assert value in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.promise("S8")
@pytest.mark.parametrize(
    "text",
    [
        '!!python/object/apply:os.mkdir ["ran"]',
        "output: !!python/name:os.system",
        "output: !!python/object/new:os.mkdir [ran]",
        "__class__: {a: 1}",
        "class_path: os.mkdir\ninit_args: {path: ran}",
        "knn: {class_path: os.mkdir, init_args: {path: ran}}",
        "no_such_field: 1",
    ],
)
def test_tags_classes_and_unknown_keys_are_errors(text, refused, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    refused(["probe", "digits", "--config", "c.yaml"])


DEPTHS = (990, 3000, 100_000)


@pytest.mark.promise("S8")
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("opened", ["[", '{"a":'])
def test_json_that_is_nested_deep_is_one_line_in_every_file(
    depth, opened, good, refused, tmp_path
):
    deep = opened * depth + "1" + ("]" if opened == "[" else "}") * depth
    hub = tmp_path / "hub"
    for name, content in (
        ("config.json", deep),
        ("config.json", f'{{"hidden_size": {deep}}}'),
        ("preprocessor_config.json", deep),
        ("preprocessor_config.json", f'{{"size": {deep}}}'),
        ("model.safetensors.index.json", f'{{"weight_map": {deep}}}'),
    ):
        shutil.copytree(good / "hub", hub)
        (hub / name).write_text(content)
        if "index" in name:
            (hub / "model.safetensors").unlink()
        refused(["predict", hub, good / "images" / "red", "--device", "cpu"], name)
        shutil.rmtree(hub)
    for name in ("names.json", "names.txt"):
        (tmp_path / name).write_text(deep)
        refused(reading(tmp_path / name, good)["classes_file"], tmp_path / name)
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for content in (deep, f'{{"format": 1, "made_from": {deep}}}'):
        (tokens / MANIFEST).write_text(content)
        with pytest.raises(TokenCacheError, match=MANIFEST):
            read_manifest(tokens)
    (tmp_path / "manifest.json").write_text(deep)
    with pytest.raises(ValueError, match="are damaged"):
        open_features(tmp_path, {"a": 1}, (6, 1), None)
    (tmp_path / "manifest.json").unlink()
    tensors = tiny_classifier().state_dict()
    for key in ("beit_fast.config", "beit_fast.classes", "beit_fast.statistics"):
        save_file(tensors, tmp_path / "m.safetensors", metadata={key: deep})
        try:
            read_weights(tmp_path / "m.safetensors")
        except ValueError as error:
            assert "m.safetensors" in str(error)  # noqa: PT017
    dvae = Dvae(DvaeConfig(vocab_size=8, encoder_width=4, decoder_width=4, decoder_input_width=4))
    save_tokenizer(dvae, tmp_path / "t.safetensors")
    metadata = {"format": "beit_fast.dvae", "config": deep}
    save_file(dvae.state_dict(), tmp_path / "t.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"t\.safetensors"):
        load_tokenizer(tmp_path / "t.safetensors")
    assert asdict(dvae.config)
    assert os.listdir(tmp_path)
