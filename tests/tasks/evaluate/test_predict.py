"""beit-fast predict: files, folders, patterns, JSON, and what cannot be read."""

import errno
import io
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from beit_fast.cli import main
from beit_fast.data.views.two_views import normalize
from beit_fast.model.heads import BeitForMaskedImageModeling
from beit_fast.tasks.evaluate.predict import find_images
from beit_fast.train.state import save_checkpoint
from labelled_images import FOUR_COLOURS, write_class_folders
from tiny_classifier import TINY_CLASSIFIER, tiny_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("labelled") / "test", 3, seed=0)


@pytest.fixture(scope="module")
def model():
    return tiny_classifier(replace(TINY_CLASSIFIER, num_classes=4)).eval()


def predict(*arguments):
    return main(["predict", *map(str, arguments), "--device", "cpu", "--num_threads", "2"])


def test_json_has_names_and_probabilities_of_every_image(
    run_folder, folder, model, tmp_path, capsys
):
    pixels = torch.arange(16 * 16 * 3, dtype=torch.uint8).view(16, 16, 3)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    images = [tmp_path / "image.png", folder / "red", f"{folder}/*/0.png"]
    arguments = ["--json", "--crop_pct", "1", "--batch_size", "2"]
    assert predict(run_folder, *images, *arguments) == 0
    said = capsys.readouterr()
    answers = json.loads(said.out)
    assert said.err == f"{folder / 'red'}: 3 images\n"  # of the one that is a folder
    names = [f"{folder}/{name}.png" for name in ("red/0", "red/1", "red/2")]
    names += [f"{folder}/{name}/0.png" for name in ("blue", "green", "red")]
    assert [answer["image"] for answer in answers] == [str(tmp_path / "image.png"), *names]
    twice = [[row["index"] for row in answers[i]["predictions"]] for i in (1, -1)]
    assert twice[0] == twice[1]
    with torch.no_grad():
        half = (0.5, 0.5, 0.5)
        wanted = model(normalize(pixels[None], half, half)).softmax(1)[0]
    first = answers[0]["predictions"]
    assert [row["index"] for row in first] == wanted.argsort(descending=True).tolist()
    assert [row["class"] for row in first] == [FOUR_COLOURS[row["index"]] for row in first]
    probabilities = torch.tensor([row["probability"] for row in first])
    torch.testing.assert_close(probabilities, wanted.sort(descending=True).values)


@pytest.fixture
def terminal(monkeypatch):
    """`terminal(encoding)` is stdout in that encoding, its bytes what a terminal gets."""

    def start(encoding):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        return sys.stdout

    return start


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_no_text_are_printed_as_they_are(
    run_folder, folder, encoding, tmp_path, terminal
):
    name = b"caf\xe9 \xc3\xa9 [b].png"  # e acute in Latin-1, and in UTF-8
    path = os.fsencode(tmp_path) + b"/" + name
    Path(os.fsdecode(path)).write_bytes((folder / "red" / "0.png").read_bytes())
    shown = {"utf-8": path, "ascii": path.replace(b"\xc3\xa9", rb"\xe9")}[encoding]

    stdout = terminal(encoding)
    assert main(["predict", str(run_folder), os.fsdecode(path), "--device", "cpu"]) == 0
    stdout.flush()
    assert stdout.buffer.getvalue().startswith(shown + b"\n")

    stdout = terminal(encoding)
    assert main(["predict", str(run_folder), str(tmp_path), "--device", "cpu", "--json"]) == 0
    stdout.flush()
    said = stdout.buffer.getvalue()
    assert rb"caf\udce9 \u00e9 [b].png" in said
    (answer,) = json.loads(said)
    assert os.fsencode(answer["image"]) == path


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("method", ["write", "flush"])  # a terminal's stream, and a file's
def test_an_output_that_takes_nothing_is_named(
    run_folder, folder, flags, method, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", type("Full", (io.StringIO,), {method: full})())
    assert predict(run_folder, folder / "red" / "0.png", *flags) == 1
    assert capsys.readouterr().err == "beit-fast: standard output: No space left on device\n"


def test_text_names_the_likeliest_first_and_as_many_as_asked(run_folder, folder, capsys):
    image = folder / "red" / "0.png"
    assert predict(run_folder, image, "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image)
    assert len(lines) == 3
    shares = [float(line.split("%")[0]) for line in lines[1:]]
    assert shares == sorted(shares, reverse=True)
    assert all(line.split()[-1] in FOUR_COLOURS for line in lines[1:])


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_what_cannot_be_read_is_named_after_the_others_are_done(
    run_folder, folder, tmp_path, flags, capsys
):
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = [tmp_path / "bad.png", folder / "red" / "0.png", tmp_path / "gone.png"]
    assert predict(run_folder, *images, *flags) == 1
    said = capsys.readouterr()
    assert "2 of 3 images cannot be used" in said.err
    for name in ("bad.png (not a JPEG", "gone.png ([Errno 2]"):
        assert name in said.err
    assert "red/0.png" in said.out
    if flags:
        kinds = [set(answer) - {"image"} for answer in json.loads(said.out)]
        assert kinds == [{"error"}, {"predictions"}, {"error"}]


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_pipes_are_told_and_never_waited_for(run_folder, folder, tmp_path, flags, capsys):
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes((folder / "red" / "0.png").read_bytes())
    (images / "1.avif").write_bytes(b"")
    os.mkfifo(images / "pipe.png")
    arguments = [images, images / "pipe.png", tmp_path / "images/p*.png", "--follow_links", "false"]
    assert predict(run_folder, *arguments, *flags) == 1
    said = capsys.readouterr()
    assert f"{images}: 1 image, 1 other file (1 .avif), 1 pipe or device left out\n" in said.err
    assert "2 of 3 images cannot be used" in said.err
    assert said.err.count("pipe.png (it is a pipe or a device and no file") == 2
    assert "0.png" in said.out
    assert not flags or len(json.loads(said.out)) == 3


def test_classes_without_names_are_numbered(model, folder, tmp_path, capsys):
    torch.save({"model": model.state_dict()}, tmp_path / "unilm.pth")
    assert predict(tmp_path / "unilm.pth", folder / "red" / "0.png") == 0
    assert "  class 0\n" in capsys.readouterr().out
    assert predict(tmp_path / "unilm.pth", folder / "red" / "0.png", "--json") == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert all(row["class"] is None for row in answer["predictions"])


def test_scores_that_are_not_finite_are_no_prediction(model, folder, tmp_path, capsys):
    state = model.state_dict()
    state["fc_norm.weight"] = torch.full_like(state["fc_norm.weight"], 3e38)  # scores overflow
    torch.save({"model": state}, tmp_path / "nan.pth")
    assert predict(tmp_path / "nan.pth", folder / "red" / "0.png", "--json") == 1
    said = capsys.readouterr()
    assert "scores are not finite" in said.err
    assert "NaN" not in said.out


def test_a_checkpoint_of_masked_image_modelling_predicts_no_class(folder, tmp_path, capsys):
    config = replace(TINY_CLASSIFIER, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    state = BeitForMaskedImageModeling(config).state_dict()
    settings = {"model": asdict(config), "statistics": "half"}
    save_checkpoint(tmp_path, 1, {"model": state}, settings, keep=1)
    assert predict(tmp_path, folder / "red" / "0.png") == 1
    said = capsys.readouterr()
    assert "beit-fast finetune RECIPE --init" in said.err
    assert said.out == ""


def test_images_are_files_folders_and_patterns(folder, tmp_path, capsys):
    assert find_images([f"{folder}/**/1.png"]) == [
        f"{folder}/{name}/1.png" for name in ("blue", "green", "red")
    ]
    odd = tmp_path / "odd[1].png"  # is there, so it is no pattern
    odd.write_bytes(b"")
    assert find_images([str(odd), "none*.png"]) == [str(odd), "none*.png"]
    assert len(find_images([str(folder)])) == 9
    (tmp_path / "linked").mkdir()
    for name in ("image.png", "other.png"):
        (tmp_path / "linked" / name).symlink_to(folder / "red" / "0.png")
    assert len(find_images([str(tmp_path / "linked")])) == 2
    with pytest.raises(ValueError, match=r"2 links left out.*--follow_links true"):
        find_images([str(tmp_path / "linked")], follow_links=False)
    (folder / "red" / "up").symlink_to(folder)
    told = []
    assert len(find_images([f"{folder}/**"], say=told.append)) == 9
    assert len(told) == 1  # what lies in a folder that matches is not read again
    assert len(find_images([f"{folder}/**/*.png"])) == 9
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images under"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="no images were named"):
        find_images([])
