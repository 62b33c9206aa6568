"""Folders of images with masks: what they hold, and what is said of those that do not fit."""

import os

import numpy as np
import pytest

from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.segmentation import MaskedImage, open_segmentation
from beit_fast.labels import IGNORE
from masked_images import blocks, encoded, picture, write_pairs

IDS = np.arange(6, dtype=np.uint8).reshape(2, 3)


@pytest.fixture
def folder(tmp_path):
    """`images` and `masks` with three pairs of six classes."""
    write_pairs(tmp_path, 3)
    return tmp_path


@pytest.fixture
def ade(tmp_path):
    """Two pairs to train on and one to validate."""
    root = tmp_path / "ADEChallengeData2016"
    for part, numbers in (("training", (1, 2)), ("validation", (3,))):
        for name in ("images", "annotations"):
            (root / name / part).mkdir(parents=True)
        for number in numbers:
            name = f"ADE_{part[:5]}_{number:08}"
            image, mask = root / "images" / part / name, root / "annotations" / part / name
            image.with_suffix(".jpg").write_bytes(encoded(picture(2, 3), "JPEG"))
            mask.with_suffix(".png").write_bytes(encoded(IDS * 30))
    return root


def open_plain(folder, **options):
    return open_segmentation(folder / "images", masks=folder / "masks", **options)


def refused(*arguments, **options) -> str:
    """What is said of it, in one line."""
    with pytest.raises(ValueError, match=r"^.*\Z") as error:
        open_segmentation(*arguments, **options)
    return str(error.value)


def test_ade20k_has_150_classes_and_label_0_is_ignored(ade):
    source = open_segmentation(ade)
    assert len(source) == 2
    assert source.name(1) == str(ade / "images/training/ADE_train_00000002.jpg")
    labels = source.labels(source.read(1).mask)
    assert labels.dtype == np.int16
    assert labels.tolist() == [[IGNORE, 29, 59], [89, 119, 149]]
    assert len(source.classes) == len(source.palette) == 150
    assert (source.classes[0], source.classes[149]) == ("wall", "flag")
    assert (source.palette[0], source.palette[149]) == ((120, 120, 120), (92, 0, 255))
    validation = open_segmentation(ade, part="validation")
    assert [validation.name(0)] == [str(ade / "images/validation/ADE_valid_00000003.jpg")]
    assert validation.classes == source.classes
    with pytest.raises(BadImageError, match="has the id 151 and the classes have 1 to 150"):
        source.labels(encoded(IDS + 146))


def test_ade20ks_classes_are_distinct_but_for_two_that_share_a_grey(ade):
    source = open_segmentation(ade)
    assert len(set(source.classes)) == 150
    assert len(set(source.palette)) == 149  # road and skyscraper
    assert source.palette[6] == source.palette[48]


def test_ade20ks_layout_with_other_classes_counts_them_from_1(ade, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {n}" for n in range(200)))
    source = open_segmentation(ade, classes_file=names)
    assert source.classes[-1] == "thing 199"
    assert source.labels(encoded(IDS)).tolist() == [[IGNORE, 0, 1], [2, 3, 4]]
    assert len(open_segmentation(ade, num_classes=151).classes) == 151


def test_a_plain_folder_has_as_many_classes_as_its_masks(folder):
    source = open_plain(folder)
    assert source.classes == tuple(f"class {label}" for label in range(6))
    assert source.palette is None
    pair = source.read(1)
    assert isinstance(pair, MaskedImage)
    assert pair.mask == (folder / "masks/01.png").read_bytes()
    assert pair.image == (folder / "images/01.bmp").read_bytes()
    assert np.array_equal(source.labels(pair.mask), blocks(41, 59, 1))
    assert open_plain(folder, num_classes=9).classes[-1] == "class 8"
    assert len(open_plain(folder, ignore=5).classes) == 5


def test_classes_with_ids_translate_the_masks(folder):
    names = folder / "names.json"
    names.write_text(
        '[{"name": "five", "id": 5, "color": "#0a0b0c"}, {"name": "two", "id": 2, '
        '"color": [1, 2, 3]}, {"name": "none", "id": 0, "color": [0, 0, 0]}]'
    )
    source = open_plain(folder, classes_file=names, ignore=1)
    assert source.classes == ("none", "two", "five")
    assert source.palette == ((0, 0, 0), (1, 2, 3), (10, 11, 12))
    assert source.labels(encoded(IDS[:1])).tolist() == [[0, IGNORE, 1]]
    with pytest.raises(BadImageError, match=r"has the ids 3, 4 and the classes have 3 ids: name"):
        source.labels(encoded(IDS))


def test_an_unknown_id_can_be_ignored_as_the_error_says(folder):
    source = open_plain(folder, num_classes=5)
    with pytest.raises(BadImageError, match=r"id 5 .* 0 to 4: pass --data.ignore for an id that"):
        source.labels(encoded(IDS))
    source = open_plain(folder, num_classes=5, ignore=5)
    assert source.labels(encoded(IDS)).tolist() == [[0, 1, 2], [3, 4, IGNORE]]


def test_a_customary_void_is_not_taken_for_the_last_of_many_classes(folder):
    ids = blocks(40, 60, 0)
    ids[0, 0] = 255
    (folder / "masks/00.png").write_bytes(encoded(ids))
    said = refused(folder / "images", masks=folder / "masks")
    assert "have ids to 5, and 255: pass --data.ignore 255 if that stands for no class" in said
    assert len(open_plain(folder, ignore=255).classes) == 6
    assert len(open_plain(folder, num_classes=256).classes) == 256


def test_masks_of_ignored_pixels_alone_have_no_classes(folder):
    for path in (folder / "masks").iterdir():
        path.write_bytes(encoded(np.zeros((40, 60), np.uint8)))
    assert "no id but those that are ignored: check --data.ignore" in refused(
        folder / "images", masks=folder / "masks", ignore=0
    )
    assert len(open_plain(folder, ignore=255).classes) == 1


def test_a_broken_mask_that_classes_are_looked_for_in_is_named(folder):
    (folder / "masks/01.png").write_bytes(b"<html>")
    said = refused(folder / "images", masks=folder / "masks")
    assert f"cannot use {folder}/masks/01.png (not a PNG" in said
    assert len(open_plain(folder, num_classes=6)) == 3  # the loader replaces it


def test_names_match_without_endings_and_with_sub_folders(tmp_path):
    for name in ("images/b/1.jpg", "images/a/1.JPEG", "images/2.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("masks/b/1.png", "masks/a/1.PNG", "masks/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    source = open_plain(tmp_path, num_classes=2)
    assert [(source.name(i), source.mask_name(i)) for i in range(3)] == [
        (f"{tmp_path}/images/2.webp", f"{tmp_path}/masks/2.png"),
        (f"{tmp_path}/images/a/1.JPEG", f"{tmp_path}/masks/a/1.PNG"),
        (f"{tmp_path}/images/b/1.jpg", f"{tmp_path}/masks/b/1.png"),
    ]


def test_links_to_images_and_masks_are_followed(folder, tmp_path):
    linked = tmp_path / "linked"
    for name in ("images", "masks"):
        (linked / name).mkdir(parents=True)
        for path in (folder / name).iterdir():
            (linked / name / path.name).symlink_to(path)
    source = open_plain(linked)
    assert source.read(2) == open_plain(folder).read(2)
    assert source.images.found.num_linked == 3
    assert "no images under" in refused(
        linked / "images", masks=linked / "masks", follow_links=False
    )


def test_an_image_without_a_mask_is_named_with_the_mask_it_needs(folder):
    (folder / "masks/01.png").rename(folder / "masks/01_mask.png")
    said = refused(folder / "images", masks=folder / "masks")
    assert f"1 of 3 images have no mask in {folder}/masks: 01.bmp; the mask of 01.bmp" in said
    assert "must be 01.png and not 01_mask.png, which is there: add or rename it" in said
    (folder / "masks/01_mask.png").unlink()
    said = refused(folder / "images", masks=folder / "masks")
    assert "must be 01.png: add or rename it, or remove the image" in said
    (folder / "images/01.bmp").unlink()
    assert len(open_plain(folder)) == 2


def test_masks_in_other_sub_folders_are_named(folder):
    (folder / "masks/deep").mkdir()
    for name in ("00", "01", "02"):
        (folder / f"masks/{name}.png").rename(folder / f"masks/deep/{name}.png")
    said = refused(folder / "images", masks=folder / "masks")
    assert "3 of 3 images" in said
    assert "must be 00.png and not deep/00.png" in said
    assert len(open_segmentation(folder / "images", masks=folder / "masks/deep")) == 3


def test_masks_without_an_image_are_counted_and_left_out(folder):
    (folder / "images/01.bmp").unlink()
    source = open_plain(folder)
    assert [source.mask_name(index) for index in range(2)] == [
        f"{folder}/masks/00.png",
        f"{folder}/masks/02.png",
    ]
    assert source.without_image == ["01.png"]


def test_two_images_of_one_name_are_refused(folder):
    (folder / "images/00.png").write_bytes(encoded(picture(40, 60)))
    said = refused(folder / "images", masks=folder / "masks")
    assert f"00.bmp and 00.png in {folder}/images have one name" in said
    (folder / "images/00.png").unlink()
    (folder / "masks/00.PNG").write_bytes(encoded(IDS))
    assert "00.PNG and 00.png in" in refused(folder / "images", masks=folder / "masks")
    (folder / "masks/00.PNG").unlink()
    assert len(open_plain(folder)) == 3


def test_a_mask_folder_that_is_missing_empty_or_of_another_format_says_so(folder, tmp_path):
    images = folder / "images"
    assert f"{folder}/mask does not exist: check" in refused(images, masks=folder / "mask")
    assert "00.png is no folder" in refused(images, masks=folder / "masks/00.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(images, masks=empty) == (
        f"no masks under {empty}: put PNG files of class ids there, each with its image's name"
    )
    (empty / "00.jpg").write_bytes(b"")
    (empty / "notes.txt").write_bytes(b"")
    said = refused(images, masks=empty)
    assert "(1 image of other formats, 1 other file (1 .txt) left out): put PNG" in said


def test_masks_among_the_images_are_refused(folder):
    (folder / "masks").rename(folder / "images/masks")
    said = refused(folder / "images", masks=folder / "images/masks")
    assert f"lies in the image folder {folder}/images, so that masks would be taken for" in said
    assert "is the image folder" in refused(folder / "images", masks=folder / "images")
    (folder / "images/masks").rename(folder / "masks")
    assert len(open_plain(folder)) == 3


def test_a_path_that_is_not_ade20k_and_has_no_masks_says_what_to_pass(folder, ade, tmp_path):
    assert "no images were named: pass --data.path" in refused("")
    assert "does not exist: give ADE20K's folder" in refused(tmp_path / "nowhere")
    said = refused(folder / "images")
    assert "does not hold images/training and annotations/training, as ADE20K" in said
    assert f"or that of the masks of {folder}/images with --data.masks" in said


@pytest.mark.parametrize("below", ["..", "images", "images/training", "annotations/training"])
def test_a_path_near_ade20ks_says_which_one_to_pass(ade, below):
    path = ade.parent if below == ".." else ade / below
    said = refused(path)
    assert said.endswith(f"pass {ade}")
    assert len(open_segmentation(said.rpartition("pass ")[2])) == 2


def test_settings_that_do_not_fit_are_refused(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdef"))
    images, masks = folder / "images", folder / "masks"
    said = refused(images, masks=masks, classes_file=names, num_classes=5)
    assert "names 6 classes and --data.num_classes is 5: leave out one" in said
    assert len(open_plain(folder, classes_file=names, num_classes=6).classes) == 6
    assert "0 classes are not possible: give 1 to 32767" in refused(
        images, masks=masks, num_classes=0
    )
    assert "--data.ignore is 65536: give an id" in refused(images, masks=masks, ignore=65536)
    said = refused(images, masks=masks, classes_file=names, ignore=3)
    assert (
        "the id 3 is ignored and is that of the class 'd' too: give another --data.ignore" in said
    )
    assert len(open_plain(folder, classes_file=names, ignore=255)) == 3


def test_the_digest_covers_images_masks_and_what_ids_mean(folder, tmp_path):
    def digest(**options):
        return open_plain(folder, **options).digest()

    first = digest()
    assert first == digest(num_classes=6)
    assert first != digest(num_classes=7)
    assert digest(num_classes=6, ignore=254) != digest(num_classes=6, ignore=255)
    mask = (folder / "masks/02.png").read_bytes()
    (folder / "masks/02.png").write_bytes(mask + b"x")
    assert digest() != first
    (folder / "masks/02.png").write_bytes(mask)
    os.rename(folder / "images/02.bmp", folder / "images/02.dib")
    assert digest() != first
    os.rename(folder / "images/02.dib", folder / "images/02.bmp")
    os.rename(folder, moved := tmp_path.with_name(tmp_path.name + "-moved"))
    assert open_plain(moved).digest() == first
    os.rename(moved, folder)


def test_a_pair_that_is_gone_is_an_error_of_the_disk(folder):
    source = open_plain(folder)
    (folder / "masks/02.png").unlink()
    with pytest.raises(OSError, match=r"02\.png"):
        source.read(2)
