import os
from pathlib import Path

import pytest

from beit_fast.data import datasets
from beit_fast.data.datasets import ImageFolder
from beit_fast.data.decode import BadImageError, decode_fast


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def listed(folder: ImageFolder) -> list[str]:
    return [os.path.relpath(folder.name(i), folder.root) for i in range(len(folder))]


def test_a_tree_of_classes_and_a_flat_folder_are_listed_in_the_order_of_their_paths(tmp_path):
    touch(tmp_path, "b/2.jpg", "b/10.JPEG", "a/x/deep.png", "z.webp", "a.jpg", "a/notes.txt", "b/c")
    folder = ImageFolder(tmp_path)
    assert listed(folder) == ["a.jpg", "a/x/deep.png", "b/10.JPEG", "b/2.jpg", "z.webp"]
    assert folder.read(1) == b"a/x/deep.png"
    assert [folder.read(i) for i in range(5)] == [name.encode() for name in listed(folder)]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    touch(tmp_path, "._a.jpg", ".cache/b.jpg", "c.jpg")
    assert listed(ImageFolder(tmp_path)) == ["c.jpg"]


def test_a_file_of_another_format_than_its_name_is_read_by_its_bytes(
    tmp_path, make_image, make_file
):
    (tmp_path / "png_named.jpg").write_bytes(make_file(make_image(8, 9), "PNG"))
    assert decode_fast(ImageFolder(tmp_path).read(0)).shape == (8, 9, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "data does not exist: check the path"),
        (lambda path: path.mkdir(), "no images under .*data: expected files ending in .bmp"),
        (lambda path: path.write_text("x"), "data is not a folder"),
        (lambda path: touch(path, "readme.txt"), "no images under"),
    ],
    ids=["missing", "empty", "file", "no-images"],
)
def test_a_folder_without_images_is_one_line_that_names_it(make, message, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message) as error:
        ImageFolder(tmp_path / "data")
    assert "\n" not in str(error.value)


def test_links_are_left_out_unless_asked_for(tmp_path):
    touch(tmp_path, "outside/far.jpg", "data/near.jpg", "data/sub/x.jpg")
    data = tmp_path / "data"
    (data / "file.jpg").symlink_to(tmp_path / "outside/far.jpg")
    (data / "folder").symlink_to(tmp_path / "outside")
    (data / "sub/loop").symlink_to(data)
    (data / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert listed(ImageFolder(data)) == ["near.jpg", "sub/x.jpg"]
    followed = ImageFolder(data, follow_links=True)
    assert listed(followed) == ["file.jpg", "folder/far.jpg", "near.jpg", "sub/x.jpg"]
    assert followed.read(1) == b"outside/far.jpg"


def test_a_folder_of_links_only_says_how_to_follow_them(tmp_path):
    touch(tmp_path, "outside/far.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="1 links left out: set follow_links"):
        ImageFolder(tmp_path / "data")
    (tmp_path / "root").symlink_to(tmp_path / "outside")  # the root itself may be a link
    assert len(ImageFolder(tmp_path / "root")) == 1


def test_a_huge_file_is_bad_and_not_read(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg")
    monkeypatch.setattr(datasets, "MAX_FILE_BYTES", 3)
    with pytest.raises(BadImageError, match="5 bytes, more than 3"):
        ImageFolder(tmp_path).read(0)
