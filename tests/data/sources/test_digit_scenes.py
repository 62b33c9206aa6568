"""Scenes of digits: what is in which part, that pixels and labels agree, and what they are for."""

import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.sources import digit_scenes
from beit_fast.data.sources.decode import BadImageError, decode_pillow
from beit_fast.data.sources.digit_scenes import (
    CLASSES,
    PALETTE,
    PARTS,
    PHOTOGRAPHS,
    SIDE,
    DigitScenes,
    labelled_scenes,
    scene,
    write_scenes,
)
from beit_fast.data.sources.segmentation import open_segmentation
from beit_fast.tasks.sources import open_source

DIGEST = """
from beit_fast.data.sources.digit_scenes import labelled_scenes
print(labelled_scenes("digit-scenes:valid:5").digest())
"""


def test_scenes_are_the_same_in_every_process():
    done = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True)
    assert done.stdout.strip() == labelled_scenes("digit-scenes:valid:5").digest(), done.stderr
    # And on every machine: of the classes, which no version of a JPEG library has a say in.
    ids = hashlib.sha256(b"".join(scene("train", number)[1].tobytes() for number in range(5)))
    assert ids.hexdigest()[:16] == "6b9bf111a68d22fa"


def test_parts_share_no_digit_and_no_photograph(monkeypatch):
    used = {part: set() for part in PARTS}
    for part in PARTS:
        digits, read = digit_scenes._digits(part), set()
        monkeypatch.setattr(digits, "read", lambda i, of=digits, to=read: to.add(i) or of._files[i])
        for number in range(20):
            scene(part, number)
        used[part] = {digits.name(index) for index in read}
        assert len(used[part]) > 30
    photographs = {part: set(names) for part, names in PHOTOGRAPHS.items()}
    for first, second in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not used[first] & used[second]
        assert not photographs[first] & photographs[second]
    assert PARTS.keys() == PHOTOGRAPHS.keys()
    there = {path.stem for path in digit_scenes._FOLDER.glob("*.jpg")}
    assert set().union(*photographs.values()) == there


def test_labels_lie_on_the_digits_which_are_brighter_than_what_is_around_them():
    for number in range(20):
        pixels, ids = scene("train", number)
        assert pixels.shape == (SIDE, SIDE, 3)
        assert ids.shape == (SIDE, SIDE)
        assert pixels.dtype == ids.dtype == np.uint8
        grey, digit = pixels.mean(axis=2), ids > 0
        assert grey[digit].mean() > grey[~digit].mean() + 40
        mirrored = digit[:, ::-1]
        assert grey[digit].mean() > grey[mirrored].mean() + 10


def test_every_class_occurs_and_background_is_most():
    source = labelled_scenes("digit-scenes:train:40")
    ids = np.stack([source.labels(source.read(index).mask) for index in range(len(source))])
    assert ids.dtype == np.int16
    shares = np.bincount(ids.ravel(), minlength=len(CLASSES)) / ids.size
    assert shares.min() > 0.004
    assert 0.7 < shares[0] < 0.95
    digits = [len(np.unique(each)) - 1 for each in ids]
    assert np.mean(digits) > 2  # several on a canvas


def test_a_few_are_drawn_from_a_part_by_their_seed():
    names = [
        {draw.name(index) for index in range(len(draw))}
        for draw in (DigitScenes(f"digit-scenes:train:20{seed}") for seed in ("", ":0", ":3"))
    ]
    assert [len(drawn) for drawn in names] == [20, 20, 20]
    assert names[0] == names[1] != names[2]
    everything = DigitScenes("digit-scenes:train")
    assert len(everything) == PARTS["train"]
    assert names[2] <= {everything.name(index) for index in range(len(everything))}


@pytest.mark.parametrize("opened", [open_source, open_segmentation])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit-scenes:tests", "names no scenes: take digit-scenes:train"),
        ("digit-scenes:train:ten", "names no scenes"),
        ("digit-scenes:train:1:2:3", "names no scenes"),
        ("digit-scenes:valid:201", "there are 200 scenes: ask for 1 to 200"),
        ("digit-scenes:train:0", "ask for 1 to 2000"),
    ],
)
def test_a_name_of_no_scenes_is_refused(opened, name, message):
    with pytest.raises(ValueError, match=message):
        opened(name)


def test_names_that_errors_advise_are_names():
    for name in ("digit-scenes:train", "digit-scenes:train:20", "digit-scenes:train:20:3"):
        assert len(open_source(name)) in (20, PARTS["train"])


def test_they_stand_for_a_folder_where_images_or_pairs_are_named(tmp_path):
    images, pairs = open_source("digit-scenes:test:3"), open_segmentation("digit-scenes:test:3")
    assert (pairs.classes, pairs.palette, len(pairs)) == (CLASSES, PALETTE, len(images))
    for index in range(len(images)):
        pair = pairs.read(index)
        assert pair.image == images.read(index)
        assert decode_pillow(pair.image).size == (SIDE, SIDE)
        assert pairs.labels(pair.mask).shape == (SIDE, SIDE)
    (tmp_path / "digit-scenes").mkdir()
    with pytest.raises(ValueError, match="no images"):
        open_source(str(tmp_path / "digit-scenes"))  # a folder, whatever it is called


def test_written_they_are_read_as_folders_of_images_and_masks(tmp_path, monkeypatch):
    monkeypatch.setattr(digit_scenes, "PARTS", {"train": 3, "valid": 1, "test": 2})
    write_scenes(tmp_path)
    written = open_segmentation(
        tmp_path / "test" / "images",
        masks=tmp_path / "test" / "masks",
        classes_file=tmp_path / "classes.json",
    )
    source = labelled_scenes("digit-scenes:test")
    assert (written.classes, written.palette) == (CLASSES, PALETTE)
    assert len(written) == len(source) == 2
    for index in range(2):
        assert written.read(index) == source.read(index)
        assert (
            written.labels(written.read(index).mask) == source.labels(source.read(index).mask)
        ).all()


def test_settings_of_folders_are_refused_with_scenes():
    for settings in ({"masks": "masks"}, {"classes_file": "names.txt"}, {"ignore": 0}):
        with pytest.raises(ValueError, match="digit-scenes:train brings its own"):
            open_segmentation("digit-scenes:train", **settings)


def test_ids_of_other_masks_are_refused():
    file = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE), 11, np.uint8)).save(file, "PNG")
    with pytest.raises(BadImageError, match="the mask has the id 11 and the classes have 0 to 10"):
        labelled_scenes("digit-scenes:test:1").labels(file.getvalue())
