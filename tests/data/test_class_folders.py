"""Labels come from the names of sub-folders."""

import pytest
from PIL import Image

from beit_fast.data.class_folders import class_folders
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
