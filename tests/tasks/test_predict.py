"""beit-fast predict: files, folders, patterns, JSON, and what cannot be read."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from beit_fast.cli import main
from beit_fast.data.views import normalize
from beit_fast.model.heads import BeitForMaskedImageModeling
from beit_fast.tasks.predict import find_images
from beit_fast.train.state import save_checkpoint
from labelled_images import write_class_folders
from tiny_classifier import TINY_CLASSIFIER, tiny_classifier

CLASSES = ["red", "blue", "pink", "green"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("labelled") / "test", 3, seed=0)


@pytest.fixture(scope="module")
def model():
    return tiny_classifier(replace(TINY_CLASSIFIER, num_classes=4)).eval()


@pytest.fixture(scope="module")
def run_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = {"model": asdict(model.config), "statistics": "half", "classes": CLASSES}
    save_checkpoint(folder, 4, {"model": model.state_dict()}, settings, keep=1)
    return folder


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
    assert said.err == ""
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
    assert [row["class"] for row in first] == [CLASSES[row["index"]] for row in first]
    probabilities = torch.tensor([row["probability"] for row in first])
    torch.testing.assert_close(probabilities, wanted.sort(descending=True).values)


def test_text_names_the_likeliest_first_and_as_many_as_asked(run_folder, folder, capsys):
    image = folder / "red" / "0.png"
    assert predict(run_folder, image, "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image)
    assert len(lines) == 3
    shares = [float(line.split("%")[0]) for line in lines[1:]]
    assert shares == sorted(shares, reverse=True)
    assert all(line.split()[-1] in CLASSES for line in lines[1:])


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
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images under"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="no images were named"):
        find_images([])
