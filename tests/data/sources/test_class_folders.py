"""Labels come from the names of sub-folders."""

import os

import pytest
from PIL import Image

from beit_fast.data.sources.class_folders import class_folders
from labelled_images import write_class_folders


def test_labels_are_the_names_of_sub_folders(tmp_path):
    _, labels, names = class_folders(write_class_folders(tmp_path / "right", 4, seed=1))
    assert names == ["blue", "green", "red"]
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    folder = write_class_folders(tmp_path / "wrong", 1, seed=0)
    (folder / "yellow").mkdir()
    with pytest.raises(ValueError, match="no images in the class 'yellow'"):
        class_folders(folder)
    (folder / "yellow" / "deep").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "yellow" / "deep" / "1.png")
    assert class_folders(folder)[1].tolist() == [0, 1, 2, 3]
    Image.new("RGB", (9, 9)).save(folder / "stray.png")
    with pytest.raises(ValueError, match=r"stray\.png lies in"):
        class_folders(folder)


def test_linked_folders_are_classes(tmp_path, touch):
    touch("far/dog/1.jpg", "far/eel/1.jpg", "far/eel/2.jpg", "data/cat/1.jpg")
    for name in ("dog", "eel"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "far" / name)
    (tmp_path / "data" / "wolf").symlink_to(tmp_path / "far" / "dog")  # its images count twice
    (tmp_path / "data" / "all").symlink_to(tmp_path / "data")  # a loop is no class
    source, labels, names = class_folders(tmp_path / "data")
    assert names == ["cat", "dog", "eel", "wolf"]
    assert labels.tolist() == [0, 1, 2, 2, 3]
    assert source.name(4) == str(tmp_path / "data/wolf/1.jpg")
    touch("data/fox/1.jpg")
    assert class_folders(tmp_path / "data", follow_links=False)[2] == ["cat", "fox"]


@pytest.mark.parametrize(
    ("images", "remedies"),
    [
        (["one/train/cat/1.jpg", "one/train/dog/1.jpg"], ["one/train"]),
        (["one/Train/cat/1.jpg", "one/Train/dog/1.jpg", "one/Val/cat/1.jpg"], ["one/Train"]),
        (["one/animals/cat/1.jpg", "one/animals/dog/1.jpg"], ["one/animals"]),
        (["one/in1k/all/cat/1.jpg", "one/in1k/all/dog/1.jpg"], ["one/in1k/all"]),
        (
            [f"one/in1k/{p}/{c}/1.jpg" for p in ("train", "val") for c in ("cat", "dog")],
            ["one/in1k/train", "one/in1k/val"],
        ),
        (
            ["one/train/cat/1.jpg", "one/train/dog/1.jpg", "one/test/1.jpg"],  # without labels
            ["one/train"],
        ),
    ],
    ids=["train", "with-a-case", "nested", "deep", "deep-parts", "flat-test"],
)
def test_a_folder_too_high_is_refused_and_the_folder_named_works(images, remedies, tmp_path, touch):
    touch(*images)
    with pytest.raises(ValueError, match=r"look like the parts|has one class") as error:
        class_folders(tmp_path / "one")
    for remedy in remedies:
        assert str(tmp_path / remedy) in str(error.value)
        assert class_folders(tmp_path / remedy)[2] == ["cat", "dog"]


def test_one_class_alone_teaches_nothing_but_can_be_counted(tmp_path, touch):
    touch("one/cat/1.jpg", "one/cat/young/2.jpg")
    with pytest.raises(ValueError, match=r"one class, cat.*sub-folder for each of two classes"):
        class_folders(tmp_path / "one")
    assert class_folders(tmp_path / "one", fewest=1)[2] == ["cat"]
    touch("one/dog/1.jpg")
    assert class_folders(tmp_path / "one")[2] == ["cat", "dog"]


def test_classes_may_be_called_as_parts_are(tmp_path, touch):
    touch("toys/train/1.jpg", "toys/test/1.jpg")
    assert class_folders(tmp_path / "toys")[2] == ["test", "train"]
    touch("more/train/steam/1.jpg", "more/ball/red/1.jpg")
    assert class_folders(tmp_path / "more")[2] == ["ball", "train"]


def test_a_class_of_unknown_formats_says_which(tmp_path, touch):
    touch("data/cat/1.jpg", "data/dog/1.heic")
    with pytest.raises(ValueError, match=r"class 'dog' .*1 other file \(1 .heic\) left out"):
        class_folders(tmp_path / "data")


def test_a_class_that_cannot_be_read_is_no_smaller_data_set(tmp_path, touch, monkeypatch):
    touch("data/cat/1.jpg", "data/dog/1.jpg")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"'dog' of .* cannot be read \(Permission denied\)"):
        class_folders(tmp_path / "data")
