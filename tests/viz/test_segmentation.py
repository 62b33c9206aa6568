"""Colours that differ, pixels that stay pixels, legends of what occurs."""

import numpy as np
import pytest
from PIL import Image

from beit_fast.labels import IGNORE
from beit_fast.viz import segmentation
from beit_fast.viz.segmentation import colour, draw_comparison, draw_overlay, overlay, palette


def distances(colours):
    lab = segmentation._lab(colours.astype(float)).astype(float)
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return apart[~np.eye(len(colours), dtype=bool)]


def test_lab_is_that_of_the_tables():
    """White, black, red, blue: the values of any table of sRGB's CIELAB, D65."""
    rgb = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]])
    wanted = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(segmentation._lab(rgb), wanted, atol=0.05)


@pytest.mark.parametrize(("num_classes", "apart"), [(3, 80), (20, 30), (150, 12)])
def test_colours_are_far_from_one_another_and_from_grey(num_classes, apart):
    """A difference of 2.3 is just noticed."""
    colours = palette(num_classes)
    assert colours.dtype == np.uint8
    assert distances(colours).min() > apart
    greys = np.array([[0, 0, 0], [255, 255, 255], [160, 160, 160]])
    assert distances(np.concatenate([colours, greys])).min() > min(apart, 12)


def test_colours_of_fewer_classes_are_the_first_of_those_of_more():
    many = palette(40)
    assert (palette(7) == many[:7]).all()
    assert (palette(40) == many).all()


def test_more_classes_than_colours_begin_again(monkeypatch):
    monkeypatch.setattr(segmentation, "LEVELS", 2)
    segmentation._candidates.cache_clear()
    colours = palette(11)
    segmentation._candidates.cache_clear()
    assert len(np.unique(colours, axis=0)) == 8
    assert (colours[8:] == colours[:3]).all()


def test_a_class_has_its_colour_and_what_is_ignored_is_hatched():
    colours = np.array([[250, 0, 0], [0, 250, 0]], np.uint8)
    ids = np.array([[0] * 20, [1] * 20, *[[IGNORE] * 20] * 18])
    found = colour(ids, colours)
    assert (found[0] == colours[0]).all()
    assert (found[1] == colours[1]).all()
    hatched = found[2:].reshape(-1, 3)
    assert {tuple(c) for c in hatched.tolist()} == set(segmentation.HATCH)


def test_an_overlay_mixes_colour_with_brightness():
    image = np.array([[[200, 100, 0], [255, 255, 255]]], np.uint8)
    found = overlay(image, np.array([[0, 0]]), np.array([[0, 0, 100]], np.uint8), opacity=0.5)
    grey = 0.299 * 200 + 0.587 * 100
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found[0, 0], [grey / 2, grey / 2, grey / 2 + 50], atol=1)
    assert found[0, 1].tolist() == [128, 128, 178]


@pytest.fixture
def texts(monkeypatch):
    """What is written into the pictures, in order."""
    said = []
    text = segmentation.ImageDraw.ImageDraw.text

    def note(self, place, words, *args, **options):
        said.append(words)
        return text(self, place, words, *args, **options)

    monkeypatch.setattr(segmentation.ImageDraw.ImageDraw, "text", note)
    return said


def test_a_legend_has_the_classes_that_occur_by_their_share(tmp_path, texts):
    ids = np.zeros((40, 100), np.int64)
    ids[:, 30:] = 2
    ids[0, 0], ids[0, 1:3] = 3, IGNORE
    names = ["wall", "sky", "a class whose name has more letters than 32", "dot"]
    image = np.full((40, 100, 3), 90, np.uint8)
    path = draw_overlay(
        image, ids, classes=names, colours=palette(4), path=tmp_path / "new" / "x.png"
    )
    long = "a class whose name ha…rs than 32"
    assert texts == [long, "70.0 %", "wall", "29.9 %", "dot", "<0.1 %", "ignored", "<0.1 %"]
    assert len(long) == segmentation.MAX_TEXT
    picture = np.array(Image.open(path))
    wanted = overlay(image, ids, palette(4)).repeat(4, 0).repeat(4, 1)  # 100 becomes 400
    assert (picture[:160, :400] == wanted).all()
    assert picture.shape[1] > 400


def test_legends_of_many_classes_stay_within_twice_the_picture(tmp_path, texts):
    ids = np.arange(150).repeat(40).reshape(60, 100)
    image = np.zeros((60, 100, 3), np.uint8)
    names = [f"class {i}" for i in range(150)]
    path = draw_overlay(image, ids, classes=names, colours=palette(150), path=tmp_path / "x.png")
    assert sorted(texts[::2]) == sorted(names)
    assert np.array(Image.open(path)).shape[1] < 3.2 * 400


def test_columns_are_image_truth_and_prediction(tmp_path, texts):
    """Of sizes that differ: a small one is enlarged, a large one thinned out."""
    rng = np.random.default_rng(0)
    sizes = [(60, 90), (720, 400)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    truths = [np.zeros(size, np.int16) for size in sizes]
    said = [np.ones(size, np.int64) for size in sizes]
    path = draw_comparison(
        images,
        truths,
        said,
        classes=["no", "yes", "never"],
        colours=palette(3),
        path=tmp_path / "x.png",
    )
    assert texts[:3] == ["image", "truth", "prediction"]
    assert texts[3::2] == ["no", "yes"]
    board = np.array(Image.open(path))
    found = images[0].repeat(2, 0).repeat(2, 1)
    top = next(y for y in range(100) if (board[y, :180] == found[0]).all())
    assert (board[top : top + 120, :180] == found).all()
    second = top + 120 + 6  # a gap
    assert (board[second : second + 360, :200] == images[1][::2, ::2]).all()
    for column, shown in ((1, 0), (2, 1)):
        left = column * (200 + 6)
        assert (board[top : top + 120, left : left + 180] == palette(3)[shown]).all()
        assert (board[second : second + 360, left : left + 200] == palette(3)[shown]).all()


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(OSError, match=r"x\.png"):
        draw_overlay(
            np.zeros((4, 4, 3), np.uint8),
            np.zeros((4, 4), int),
            classes=["a"],
            colours=palette(1),
            path=tmp_path / "x.png",
        )
