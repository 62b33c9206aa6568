"""Commands that read a file in every place, and the one line of a refusal."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from beit_fast.cli import main
from beit_fast.weights.files import write_weights
from beit_fast.weights.save import save_pretrained
from labelled_images import write_class_folders
from tiny_classifier import TINY_CLASSIFIER, tiny_classifier


def write_good(root: Path) -> Path:
    """What is right in every respect: w.safetensors, hub, images in class folders, masks."""
    model = tiny_classifier(replace(TINY_CLASSIFIER, num_classes=3))
    write_weights(root / "w.safetensors", model.state_dict())
    save_pretrained(model, root / "hub", labels=["blue", "green", "red"], statistics="half")
    write_class_folders(root / "images", 2, seed=0)
    (root / "masks").mkdir()
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(root / "masks" / "0.png")
    return root


def reading(path: str | Path, good: Path) -> dict[str, list]:
    """Commands that read `path`, by what it is given as; all else is of `write_good`."""
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
        "data.classes_file": [
            *["segment", "digits", "--init", "null", *cpu, "--data.path", images, *masks],
            *["--data.classes_file", path],
        ],
        "config": ["probe", "digits", "--config", path],
    }


def refusal(arguments: list, capsys) -> str:
    """The one line that the command ends with, and its code is 1 or 2."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    lines = [x for x in said.err.splitlines() if not re.match(r"WARNING|.*: \d+ images?\b", x)]
    assert code in (1, 2), said
    assert len(lines) == 1, lines
    assert lines[0].startswith("beit-fast: ")
    assert "Traceback" not in said.out + said.err
    return lines[0]


def files_of(folder: Path) -> list[Path]:
    """All but outputs of the recipes, which are made first: those of a refused run are empty."""
    return sorted(path for path in folder.rglob("*") if "runs" not in path.parts)


def refused_in(folder: Path, capsys) -> Callable[..., float]:
    """`check(arguments, *names)`: one line with the names, and no new file in `folder`, which is
    the working directory. CPU seconds."""

    def check(arguments: list, *names: object) -> float:
        before, begun = files_of(folder), time.process_time()
        line = refusal(arguments, capsys)
        seconds = time.process_time() - begun
        assert [name for name in names if str(name) not in line] == [], line
        assert files_of(folder) == before
        return seconds

    return check
