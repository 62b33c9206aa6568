"""Every verb with wrong inputs: one line that names the flag or the path, and never a traceback.

Inputs are generated: kinds of wrong files in every place where a file is read, wrong places in
every place where one is written, wrong words in every recipe.
"""

import json
import os
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from beit_fast import cli
from beit_fast.cli import main
from beit_fast.model.weight_files import write_weights
from beit_fast.tokenizer.checkpoint import save_tokenizer
from beit_fast.tokenizer.dvae import Dvae, DvaeConfig
from labelled_images import write_class_folders
from tiny_classifier import TINY_CLASSIFIER, tiny_classifier

HTML = b"<!DOCTYPE html>\n<html><body>404: no such file</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
GARBAGE = bytes((37 * i * i + 11) % 256 for i in range(4000))
CONTENTS = {
    "empty": b"",
    "html": HTML,
    "pointer": POINTER,
    "garbage": GARBAGE,
    "gzip": b"\x1f\x8b\x08" + GARBAGE,
    "zip": b"PK\x03\x04" + GARBAGE,
    "json": b'{"a": [1, 2]}',
    "list": b"[1, 2, 3]",
    "number": b"3",
    "deep": b"[" * 3000,
    "pickle": b"\x80\x04\x95" + GARBAGE[:100],
    "png": b"\x89PNG\r\n\x1a\n" + GARBAGE,
    "jpeg": b"\xff\xd8\xff" + GARBAGE,
}
HUGE_HEADER = (2**62).to_bytes(8, "little") + GARBAGE
TINY = {
    "pretrain": ["demo", "--run.steps", "1", "--optim.warmup_steps", "0"],
    "tokenizer": ["demo", "--run.steps", "1", "--optim.warmup_steps", "0"],
    "finetune": ["digits", "--run.epochs", "1", "--optim.warmup_epochs", "0"],
    "probe": ["digits"],
    "pretokenize": ["demo"],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What is right in every respect but the one that a case makes wrong."""
    root = tmp_path_factory.mktemp("good")
    model = tiny_classifier(replace(TINY_CLASSIFIER, num_classes=3))
    torch.save({"model": model.state_dict()}, root / "w.pth")
    write_weights(root / "w.safetensors", model.state_dict())
    torch.manual_seed(0)
    config = DvaeConfig(
        vocab_size=32, encoder_width=8, decoder_width=8, decoder_input_width=8, blocks_per_group=1
    )
    save_tokenizer(Dvae(config), root / "t.safetensors")
    write_class_folders(root / "images", 2, seed=0)
    (root / "config.json").write_text(json.dumps(asdict(model.config)))
    return root


@pytest.fixture
def refuse(capsys, tmp_path, monkeypatch):
    """`refuse(arguments, names)`: the command ends with one line that has one of `names`."""
    monkeypatch.chdir(tmp_path)

    def check(arguments, names):
        arguments = [str(argument) for argument in arguments]
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        except Exception as error:  # a traceback, on a terminal
            code = f"{type(error).__name__}: {error}"
        said = capsys.readouterr()
        lines = [x for x in said.err.splitlines() if not x.startswith("WARNING")]
        right = (
            code in (1, 2)
            and "Traceback" not in said.out + said.err
            and len(lines) == 1
            and lines[0].startswith("beit-fast: ")
            and len(lines[0]) < 900
            and any(str(name) in lines[0] for name in names)
        )
        if not right:
            failures.append(f"{arguments} gave {code}, names none of {names}: {said.err[:900]}")

    failures = []
    yield check
    assert not failures, "\n\n".join(failures)


def wrong_files(folder, good, names):
    """Files of every wrong content under each of the names, and folders in their place."""
    contents = dict(CONTENTS) | {"header": HUGE_HEADER}
    for name in names:
        suffix = os.path.splitext(name)[1]
        whole = good / name
        cut = {}
        if whole.is_file():
            data = whole.read_bytes()
            cut = {f"cut{n}": data[: len(data) * n // 10] for n in (1, 5, 9)}
            flipped = bytearray(data)
            for place in range(100, min(len(data), 3000), 150):
                flipped[place] ^= 0x55
            cut["flipped"] = bytes(flipped)
        for kind, content in (contents | cut).items():
            path = folder / f"{kind}{suffix}"
            path.write_bytes(content)
            yield path
    (folder / "a folder").mkdir()
    yield folder / "a folder"
    yield folder / "missing.safetensors"
    yield folder / "empty.pth" / "below a file.pth"


WEIGHTS = ("w.pth", "w.safetensors", "w.bin", "w.index.json", "w")


@pytest.mark.parametrize("verb", ["evaluate", "predict", "convert", "finetune", "probe"])
def test_wrong_weights(verb, good, tmp_path, refuse):
    images = good / "images"
    for path in wrong_files(tmp_path, good, WEIGHTS):
        recipe = TINY.get(verb, [])
        commands = {
            "evaluate": [verb, path, images, "--device", "cpu"],
            "predict": [verb, path, images, "--device", "cpu"],
            "convert": [verb, path, tmp_path / "out.safetensors", "--to", "timm"],
            "finetune": [verb, *recipe, "--init", path, "--run.device", "cpu"],
            "probe": [verb, *recipe, "--checkpoint", path, "--device", "cpu"],
        }
        refuse(commands[verb], [path])


def test_wrong_tokenizers(good, tmp_path, refuse):
    for path in wrong_files(tmp_path, good, ("t.safetensors", "t.pkl")):
        for verb in ("pretrain", "pretokenize"):
            arguments = [verb, "demo", "--tokenizer", path, "--tokenizer_training", "null"]
            refuse([*arguments, "--run.device", "cpu"], [path])
        for one in ("--encoder", "--decoder"):
            pair = ["--encoder", path, "--decoder", path, "--output", tmp_path / "out"]
            refuse(["convert-dalle", *pair, one, path], [path])
