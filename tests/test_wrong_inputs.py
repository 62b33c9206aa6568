"""Every verb with wrong inputs: one line that names the flag or the path, and never a traceback.

Inputs are generated: kinds of wrong files in every place where a file is read, wrong places in
every place where one is written, wrong words in every recipe.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from beit_fast import cli
from beit_fast.cli import main
from beit_fast.tokenizer.checkpoint import save_tokenizer
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.weights.files import write_weights
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
    "segment": ["digits", "--run.steps", "1", "--optim.warmup_steps", "0"],
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
        lines = [x for x in said.err.splitlines() if not re.match(r"WARNING|.*: \d+ images?\b", x)]
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
    # finetune reads them as the others do, but makes its classes first, which takes longer.
    for path in wrong_files(tmp_path, good, WEIGHTS[:2] if verb == "finetune" else WEIGHTS):
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
        for verb in ("pretrain", "pretokenize")[: 2 if path.stem in ("html", "cut5") else 1]:
            arguments = [verb, "demo", "--tokenizer", path, "--tokenizer_training", "null"]
            refuse([*arguments, "--run.device", "cpu"], [path])
        for one in ("--encoder", "--decoder"):
            pair = ["--encoder", path, "--decoder", path, "--output", tmp_path / "out"]
            refuse(["convert-dalle", *pair, one, path], [path])


CLASSIFIES = ("evaluate", "predict")
LOOKS = ("pack", "check")  # at images alone
FOLDER_FLAGS = {
    "pretrain": ["--data.path"],
    "tokenizer": ["--data.path"],
    "pretokenize": ["--data.path"],
    "finetune": ["--data.path", "--data.test"],
    "probe": ["--train", "--test"],
}


def command(verb, good, tmp_path):
    """A command that would do, into `tmp_path`."""
    out = str(tmp_path / "out")
    match verb:
        case "evaluate":
            return [verb, good / "w.pth", good / "images", "--device", "cpu", "--output", out]
        case "predict":
            return [verb, good / "w.pth", good / "images", "--device", "cpu"]
        case "pack":
            return [verb, good / "images", out]
        case "check":
            return [verb, good / "images", "--output", f"{out}.json"]
        case "convert":
            return [verb, good / "w.pth", tmp_path / "out.safetensors", "--to", "timm"]
        case "convert-dalle":
            return [verb, "--encoder", "e.pkl", "--decoder", "d.pkl", "--output", out]
        case "probe":
            return [verb, *TINY[verb], "--checkpoint", good / "w.pth", "--output", out]
        case "pretrain" | "pretokenize":
            given = ["--tokenizer", good / "t.safetensors", "--tokenizer_training", "null"]
            given += ["--model.vocab_size", "32", "--run.output", f"{out}/run"]
            return [verb, *TINY[verb], *given, *(["--output", out] if verb != "pretrain" else [])]
    return [verb, *TINY[verb], "--run.output", out]


@pytest.mark.parametrize("verb", [*FOLDER_FLAGS, *CLASSIFIES, *LOOKS])
def test_wrong_folders_of_images(verb, good, tmp_path, refuse):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    (tmp_path / "file.png").write_bytes(GARBAGE)
    bad = ["missing", "hollow", "text", "file.png", "file.png/below"]
    for path in (tmp_path / name for name in bad):
        if verb in CLASSIFIES:
            refuse([verb, good / "w.pth", path, "--device", "cpu"], [path])
            continue
        if verb in LOOKS:
            refuse([verb, path, *command(verb, good, tmp_path)[2:]], [path])
            continue
        for flag in FOLDER_FLAGS[verb]:
            if flag == "--data.test":
                refuse([*command(verb, good, tmp_path), flag, path, "--init", "null"], [path])
            else:
                refuse([*command(verb, good, tmp_path), flag, path], [path])


@pytest.mark.parametrize("verb", [*FOLDER_FLAGS, *CLASSIFIES, *LOOKS])
def test_wrong_images(verb, good, tmp_path, refuse):
    for kind, content in CONTENTS.items():
        for name in ("a", "b"):
            path = tmp_path / "images" / name / f"{kind}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    folder = tmp_path / "images"
    arguments = command(verb, good, tmp_path)
    if verb == "evaluate":
        shutil.copytree(folder / "a", folder / "c")
        refuse([verb, good / "w.pth", folder, "--device", "cpu", "--match", "order"], [folder])
    elif verb == "predict":
        for path in sorted((folder / "a").iterdir()):
            refuse([verb, good / "w.pth", path, "--device", "cpu"], [path])
    elif verb in LOOKS:
        refuse([verb, folder, *arguments[2:]], [folder])
    elif verb == "probe":
        refuse([*arguments, "--train", folder, "--test", folder], [folder])
    else:
        refuse([*arguments, "--data.path", folder, *_init(verb)], [folder])


def _init(verb):
    return ["--init", "null"] if verb == "finetune" else []


@pytest.mark.parametrize("verb", [*FOLDER_FLAGS, "evaluate", "convert", *LOOKS])
def test_wrong_places_to_write(verb, good, tmp_path, refuse):
    file = tmp_path / "a file"
    file.write_bytes(b"x")
    folder = tmp_path / "a folder"
    (folder / "below").mkdir(parents=True)
    places = [file / "below", file / "below" / "it"]
    places += [file] if verb not in ("evaluate", "convert", "check") else [folder]
    for place in places:
        arguments = command(verb, good, tmp_path)
        if verb == "convert":
            for to in ("timm", "hf", "unilm"):
                if (to, place) != ("hf", folder):
                    refuse([verb, good / "w.pth", place, "--to", to], [place, file])
        elif verb == "pretrain":
            refuse([*arguments, "--run.output", place], [place, file])
        elif verb == "pack":
            refuse([*arguments[:2], place, "--name", "a"], [place, file])
        elif verb in ("pretokenize", "evaluate", "probe", "check"):
            refuse([*arguments, "--output", place], [place, file])
        else:
            refuse([*arguments, "--run.output", place, *_init(verb)], [place, file])


def test_wrong_token_caches(good, tmp_path, refuse):
    manifests = dict(CONTENTS) | {
        "format": b'{"format": 99}',
        "hollow": b'{"format": 1}',
        "typed": b'{"format": 1, "made_from": 3, "num_views": "x", "images_per_shard": [],'
        b' "files": 7, "environment": null}',
    }
    given = ["--tokenizer", "null", "--run.device", "cpu"]
    for kind, content in manifests.items():
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "manifest.json").write_bytes(content)
        refuse([*command("pretrain", good, tmp_path), *given, "--token_cache", folder], [folder])
    for path in (tmp_path / "missing", good / "w.pth", good):
        refuse([*command("pretrain", good, tmp_path), *given, "--token_cache", path], [path])


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "preprocessor_config.json"])
def test_wrong_descriptions_beside_weights(name, good, tmp_path, refuse):
    descriptions = dict(CONTENTS) | {
        "fields": b'{"hidden_size": "x", "image_size": [], "layer_norm_eps": null, "id2label": 3,'
        b' "model_type": "beit", "num_attention_heads": {}}',
        "step": b'{"format": 1, "settings": {"model": {"depth": "x"}, "classes": 3},'
        b' "files": {"model.safetensors": 3}}',
        "images": b'{"image_mean": 3, "image_std": ["a"], "size": {"height": "x"},'
        b' "crop_size": {"width": {}}, "do_center_crop": true, "resample": []}',
        "zeros": b'{"image_mean": [0, 0, 0], "image_std": [0, 0, 0], "size": 0, "crop_size": 0}',
    }
    harmless = {"config.json": {"images", "zeros"}, "preprocessor_config.json": {"json"}}
    harmless["preprocessor_config.json"] |= {"fields", "step"}
    for kind, content in descriptions.items():
        if kind in harmless.get(name, ()):
            continue
        folder = tmp_path / kind
        folder.mkdir()
        shutil.copy(good / "w.safetensors", folder / "model.safetensors")
        (folder / name).write_bytes(content)
        images = good / "images" / "red"
        refuse(["predict", folder, images, "--device", "cpu"], [folder, name])


CONFIGS = dict(CONTENTS) | {
    "number section": b"optim: 3",
    "list section": b"run: [1, 2]",
    "word": b"optim: {lr: fast}",
    "range": b"optim: {lr: -1}",
    "nan": b"optim: {lr: .nan}",
    "key": b"optim: {lrr: 1}",
    "section": b"optmi: {lr: 1}",
    "syntax": b"optim: {lr: 1",
    "tabs": b"optim:\n\tlr: 1",
    "nul": b'run: {output: "a\\0b"}',
    "anchor": b"a: *b",
    "object": b"a: !!python/object:os.system x",
}


@pytest.mark.promise("S8")
@pytest.mark.parametrize("verb", cli.VERBS)
def test_wrong_configuration_files(verb, tmp_path, refuse):
    # One parser reads them for all verbs: the largest ones, which take longest, see some.
    some = ("html", "number section", "word", "range", "key")
    for kind, content in CONFIGS.items():
        if verb in ("pretrain", "pretokenize", "finetune", "segment") and kind not in some:
            continue
        path = tmp_path / f"{kind}.yaml"
        path.write_bytes(content)
        refuse([verb, TINY[verb][0], "--config", path], [path, "--optim", "--run"])
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "key.yaml" / "x"):
        refuse([verb, TINY[verb][0], "--config", path], [path])


@pytest.mark.promise("S8")
@pytest.mark.parametrize("verb", cli.VERBS)
def test_wrong_words(verb, tmp_path, refuse):
    recipe = TINY[verb][0]
    refuse([verb, recipe, "--no_such_flag", "3"], ["--no_such_flag"])
    refuse([verb, recipe, "word"], ["word"])
    refuse([verb, recipe, "--config"], ["--config"])
    flags = {
        "pretrain": ["run.precision", "tokenizer_training.run.precision", "model.depth"],
        "pretokenize": ["run.device", "tokenizer_training.optim.lr", "num_views"],
        "tokenizer": ["optim.betas", "codebook_init", "beta.start", "view.scale"],
        "finetune": ["augment.scale", "data.held_out", "layer_decay", "grad_checkpointing"],
        "segment": ["augment.ratio", "evaluation.stride", "model.taps", "data.ignore"],
        "probe": ["knn", "rates", "statistics", "weights"],
    }
    words = ("", "word", "-3", ".nan", "[1,2,3]", "{a: 1}", "1e999", "[")
    for flag in flags[verb]:
        for word in words:
            if (flag, word) in (("knn", "[1,2,3]"), ("rates", "[1,2,3]")):
                continue
            refuse([verb, recipe, f"--{flag}", word], [f"--{flag}"])


def test_wrong_words_without_a_recipe(good, tmp_path, refuse):
    for verb in ("evaluate", "predict"):
        for flag, word in (
            ("crop_pct", "2"),
            ("img_size", "[16]"),
            ("img_size", "-16"),
            ("weights", "best"),
            ("batch_size", "0"),
            ("num_threads", "9999"),
            ("device", "tpu"),
            ("interpolation", "7"),
        ):
            arguments = command(verb, good, tmp_path)
            refuse([*arguments[:3], f"--{flag}", word], [f"--{flag}"])
        refuse([verb], ["checkpoint"])
        refuse([verb, "", ""], ["CHECKPOINT"])
    for verb, flag, word in (
        *(("pack", "short_side", "0"), ("pack", "quality", "101"), ("pack", "quality", "80")),
        *(("pack", "seed", "-1"), ("pack", "seed", "4294967296"), ("pack", "name", "a/b")),
        *(("pack", "images_per_shard", "0"), ("pack", "num_threads", "0")),
        *(("check", "img_size", "0"), ("check", "num_threads", "2000"), ("check", "output", "")),
        *(("pack", "max_bad_share", "2"), ("check", "max_pixels", "0")),
    ):
        refuse([*command(verb, good, tmp_path), f"--{flag}", word], [f"--{flag}"])
    refuse(["pack"], ["images"])
    refuse(["pack", good / "images"], ["shards"])
    refuse(["pack", "", ""], ["IMAGES"])
    refuse(["pack", good / "images", ""], ["SHARDS"])
    refuse(["check", ""], ["IMAGES"])
    refuse(["convert", good / "w.pth", tmp_path / "x.pth"], ["to"])
    refuse(["convert", good / "w.pth", tmp_path / "x.pth", "--to", "keras"], ["--to"])
    refuse(["convert", good / "w.pth", tmp_path / "x.pth", "--to", "hf", "--key", "ema"], ["ema"])
    refuse(["convert-dalle", "--encoder", "x"], ["--decoder", "decoder"])
