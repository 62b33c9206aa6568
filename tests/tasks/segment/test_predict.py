"""beit-fast predict-segmentation: ids and overlays of files, folders and patterns."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.cli import main
from beit_fast.data.views.statistics import STATISTICS
from beit_fast.tasks.segment.config_evaluation import SlideConfig
from beit_fast.tasks.segment.predict import output_names, save_ids
from beit_fast.tasks.segment.sliding import segment_image
from beit_fast.viz.segmentation import overlay
from tiny_segmenter import save_run, tiny_segmenter

CLASSES, PALETTE = ("ground", "red", "blue"), ((90, 90, 90), (255, 0, 0), (0, 0, 255))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    settings = {"statistics": "half", "classes": CLASSES, "palette": PALETTE}
    return save_run(tmp_path_factory.mktemp("run"), tiny_segmenter(), **settings)


@pytest.fixture
def predict(run_folder, tmp_path):
    def run(*images, checkpoint=run_folder):
        arguments = [checkpoint, *images, "--output", tmp_path / "out"]
        flags = ["--device", "cpu", "--num_threads", "2"]
        return main(["predict-segmentation", *map(str, arguments), *flags])

    return run


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image)


def test_ids_and_overlay_of_every_image(predict, boxes, tmp_path, capsys):
    images = [boxes / "test" / "0.png", f"{boxes}/test/[12].png"]
    assert predict(*images) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    model = tiny_segmenter()
    for number in range(3):
        image = torch.from_numpy(pixels_of(boxes / "test" / f"{number}.png"))
        wanted = segment_image(model, image, SlideConfig(), STATISTICS["half"], "fp32").numpy()
        found = pixels_of(out / "ids" / f"{number}.png")
        assert found.dtype == np.uint8
        assert (found == wanted).all()
        assert len(np.unique(wanted)) > 1
        shown = overlay(image.numpy(), wanted, np.array(PALETTE, np.uint8))
        factor = -(-320 // max(wanted.shape))
        shown = shown.repeat(factor, 0).repeat(factor, 1)
        picture = pixels_of(out / "overlays" / f"{number}.png")
        assert (picture[: len(shown), : shown.shape[1]] == shown).all()
        assert f"{boxes}/test/{number}.png: {out}/ids/{number}.png\n" in said
        label = int(np.bincount(wanted.ravel()).argmax())
        share = (wanted == label).mean()
        assert f"  {share:7.2%}  {CLASSES[label]}\n" in said


def test_what_is_there_is_not_overwritten_unasked(predict, boxes, tmp_path, capsys):
    image = boxes / "test" / "0.png"
    assert predict(image) == 0
    written = tmp_path / "out" / "ids" / "0.png"
    written.write_bytes(b"mine")
    assert predict(image) == 1
    said = capsys.readouterr().err
    assert f"{written}, {tmp_path}/out/overlays/0.png would be overwritten: " in said
    assert "pass another --output, or --overwrite to" in said
    assert written.read_bytes() == b"mine"
    assert predict(image, "--overwrite") == 0
    assert written.read_bytes() != b"mine"


def test_images_of_one_name_have_files_of_their_own(predict, boxes, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (30, 50)).save(other / "0.jpg")
    assert predict(boxes / "test" / "0.png", other, boxes / "test" / "0.png") == 0
    shapes = {path.name: pixels_of(path).shape for path in (tmp_path / "out" / "ids").iterdir()}
    assert shapes == {"0.png": (44, 52), "0_2.png": (50, 30)}  # what is named twice is done once


def test_names_of_results_differ():
    names = output_names(["a/x.jpg", "b/x.png", "x_2.gif", "c/x.webp", "y", "z.tar.png"])
    assert names == ["x.png", "x_3.png", "x_2.png", "x_4.png", "y.png", "z.tar.png"]
    assert output_names(["A.jpg", "a.jpg", "a_2.jpg"]) == ["A.png", "a_3.png", "a_2.png"]
    assert output_names(["x_2.jpg", "x.jpg", "d/x.jpg"]) == ["x_2.png", "x.png", "x_3.png"]


def test_images_that_cannot_be_read_are_named_and_the_others_done(predict, boxes, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    missing = tmp_path / "missing.jpg"
    assert predict(tmp_path / "bad.png", boxes / "test" / "1.png", missing) == 1
    said = capsys.readouterr().err
    assert "2 of 3 images cannot be used: " in said
    assert f"{tmp_path}/bad.png (not a JPEG" in said
    assert f"{missing} (" in said
    assert [path.name for path in (tmp_path / "out" / "ids").iterdir()] == ["1.png"]


def test_names_and_colours_of_a_file(predict, boxes, tmp_path, capsys):
    torch.save({"state_dict": tiny_segmenter(img_size=32).state_dict()}, tmp_path / "w.pth")
    names = tmp_path / "names.json"
    names.write_text(json.dumps([{"name": n, "color": c} for n, c in zip("xyz", PALETTE)]))  # noqa: B905
    image = boxes / "test" / "0.png"
    flags = ["--classes_file", names, "--overwrite"]
    assert predict(image, *flags, checkpoint=tmp_path / "w.pth") == 0
    said = capsys.readouterr().out
    assert any(f"%  {name}\n" in said for name in "xyz")
    assert predict(image, "--overwrite", checkpoint=tmp_path / "w.pth") == 0
    assert "%  class " in capsys.readouterr().out
    names.write_text(json.dumps(["a", "b"]))
    assert predict(image, *flags) == 1
    assert "names 2 classes and the checkpoint has 3: name these" in capsys.readouterr().err


@pytest.mark.parametrize(("num_classes", "kind"), [(256, np.uint8), (257, np.uint16)])
def test_ids_have_as_many_bits_as_they_need(num_classes, kind, tmp_path):
    ids = np.arange(num_classes)[None].repeat(2, 0)
    save_ids(ids, num_classes, tmp_path / "x.png")
    found = pixels_of(tmp_path / "x.png")
    assert found.dtype == kind
    assert (found == ids).all()


def test_an_output_that_cannot_be_is_told_before_the_work(predict, boxes, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert predict(boxes / "test" / "0.png") == 1
    assert "nothing can be written to" in capsys.readouterr().err


def test_several_processes_are_refused(predict, boxes, monkeypatch, capsys):
    class Two:
        size = 2

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    module = "beit_fast.tasks.segment.predict.open_world"
    monkeypatch.setattr(module, lambda *_, **__: Two())
    assert predict(boxes / "test" / "0.png") == 1
    assert "started 2 processes: prediction runs in one" in capsys.readouterr().err
