"""evaluate-segmentation and predict-segmentation with wrong inputs: one line that names which."""

import re

import pytest
import torch

from beit_fast.cli import main
from tiny_segmenter import tiny_segmenter

VERBS = ("evaluate-segmentation", "predict-segmentation")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "w.pth"
    torch.save({"state_dict": tiny_segmenter(img_size=32).state_dict()}, path)
    return path


@pytest.fixture
def refuse(capsys, tmp_path, monkeypatch):
    """`refuse(verb, arguments, name)`: it ends with one line, and that has the name."""
    monkeypatch.chdir(tmp_path)

    def check(verb, arguments, name):
        try:
            code = main([verb, *map(str, arguments), "--device", "cpu"])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        lines = [x for x in said.err.splitlines() if not re.match(r"WARNING|.*: \d+ images?\b", x)]
        assert code in (1, 2), arguments
        assert len(lines) == 1, said.err
        assert lines[0].startswith("beit-fast: ")
        assert str(name) in lines[0]

    return check


def command(verb, weights, images):
    output = "found.json" if verb == VERBS[0] else "out"
    masks = ["--data.masks", images] if verb == VERBS[0] else []
    return [weights, images, "--output", output, *masks]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("stride", "0"),
        ("stride", "[1,2,3]"),
        ("stride", "99"),
        ("scale", "[32,64]"),
        ("scale", "64"),
        ("multi_scale", "[]"),
        ("multi_scale", "[0]"),
        ("flip", "maybe"),
        ("windows_at_once", "0"),
        ("img_size", "30"),
        ("statistics", "none"),
        ("precision", "fp64"),
    ],
)
def test_wrong_words(verb, flag, word, weights, boxes, refuse):
    # What only the model can refuse has no dashes: "stride is 99 and the window 32x32".
    name = f"--{flag}" if (flag, word) not in (("stride", "99"), ("img_size", "30")) else flag
    refuse(verb, [*command(verb, weights, boxes / "test"), f"--{flag}", word], name)


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_weights_and_images(verb, weights, boxes, tmp_path, refuse):
    (tmp_path / "empty").mkdir()
    (tmp_path / "w.pth").write_bytes(b"<html>")
    for path in (tmp_path / "missing.pth", tmp_path / "w.pth", tmp_path / "empty"):
        refuse(verb, command(verb, path, boxes / "test"), path)
    for path in (tmp_path / "missing", tmp_path / "empty"):
        refuse(verb, command(verb, weights, path), path)
    refuse(verb, ["", *command(verb, weights, boxes / "test")[1:]], "CHECKPOINT")


def test_wrong_places_to_write(weights, boxes, tmp_path, refuse):
    (tmp_path / "file").write_text("x")
    for verb, place in ((VERBS[0], "file/below"), (VERBS[0], "."), (VERBS[1], "file")):
        refuse(verb, [*command(verb, weights, boxes / "test"), "--output", place], place[:4])


def test_masks_that_are_missing_or_of_no_layout(weights, boxes, tmp_path, refuse):
    refuse(VERBS[0], [weights, boxes / "test"], "--data.masks")
    (tmp_path / "none").mkdir()
    masks = ["--data.masks", tmp_path / "none"]
    refuse(VERBS[0], [weights, boxes / "test", *masks], tmp_path / "none")
    refuse(VERBS[0], [weights, boxes / "test", "--data.ignore", "-1"], "--data.ignore")
    refuse(VERBS[1], [weights], "images")
    refuse(VERBS[1], [weights, boxes / "test"], "output")
