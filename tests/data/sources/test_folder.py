import hashlib
import os
import socket
from pathlib import Path

import pytest

from beit_fast.data.sources import folder as datasets
from beit_fast.data.sources.decode import BadImageError, decode_fast
from beit_fast.data.sources.folder import ImageFolder, read_image_file
from beit_fast.data.sources.scan import EXTENSIONS


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(path))  # at most 107 bytes


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
        (lambda path: path.mkdir(), "no images under .*data: expected files ending in .apng"),
        (lambda path: path.write_text("x"), "data is not a folder"),
        (
            lambda path: touch(path, "readme.txt"),
            r"no images under .*data \(1 other file \(1 .txt\) left out\)",
        ),
    ],
    ids=["missing", "empty", "file", "no-images"],
)
def test_a_folder_without_images_is_one_line_that_names_it(make, message, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message) as error:
        ImageFolder(tmp_path / "data")
    assert "\n" not in str(error.value)


def test_a_path_or_archives_that_are_often_given_are_told_what_to_do(tmp_path):
    for path, said in {
        "~/photos": "; a shell knows the folder ~ outside of quotes alone: write it in full$",
        f"{tmp_path}/x*": r"; a pattern names shards or tables and ends in .tar, .parquet, .arrow$",
        f"{tmp_path}/none": "none does not exist: check the path$",
    }.items():
        with pytest.raises(ValueError, match=said):
            ImageFolder(path)
    touch(tmp_path, "a.tar.gz")
    with pytest.raises(ValueError, match="archives have to be unpacked first, shards to files end"):
        ImageFolder(tmp_path)


def test_a_folder_of_links_alone_is_read_and_without_them_names_the_flag(tmp_path):
    touch(tmp_path, "outside/far.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a").symlink_to(tmp_path / "outside")
    assert listed(ImageFolder(tmp_path / "data")) == ["a/far.jpg"]
    with pytest.raises(ValueError, match=r"\(1 link left out\).*pass --data.follow_links true, or"):
        ImageFolder(tmp_path / "data", follow_links=False)
    (tmp_path / "root").symlink_to(tmp_path / "outside")  # the root itself may be a link
    assert len(ImageFolder(tmp_path / "root", follow_links=False)) == 1


def test_every_ending_that_is_read_is_of_a_format_that_the_decoder_reads(
    tmp_path, make_image, make_file
):
    formats = dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi"), "JPEG")
    formats |= {".png": "PNG", ".apng": "PNG", ".webp": "WEBP", ".gif": "GIF"}
    formats |= {".bmp": "BMP", ".dib": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
    formats |= dict.fromkeys((".pbm", ".pgm", ".ppm", ".pnm"), "PPM")
    assert formats.keys() == EXTENSIONS
    modes = {".pbm": "1", ".pgm": "L"}
    for ending, format in formats.items():
        image = make_image(8, 9).convert(modes.get(ending, "RGB"))
        (tmp_path / f"image{ending}").write_bytes(make_file(image, format))
    folder = ImageFolder(tmp_path)
    assert [decode_fast(folder.read(i)).shape for i in range(len(folder))] == [(8, 9, 3)] * 18


def test_the_digest_is_of_what_it_always_was(tmp_path):
    """Token caches and runs of earlier versions go on."""
    touch(tmp_path, "b/2.jpg", "b/10.JPEG", "a/x/deep.png", "a/notes.txt")
    digest = hashlib.sha256(b"a/x/deep.png\0b/10.JPEG\0b/2.jpg\0" + b"12\x009\x007\0")
    assert ImageFolder(tmp_path).digest() == digest.hexdigest()


@pytest.mark.parametrize("make", [os.mkfifo, bind_socket], ids=["pipe", "socket"])
def test_a_pipe_or_socket_is_refused_at_once(make, tmp_path):
    make(tmp_path / "image.jpg")
    with pytest.raises((BadImageError, OSError), match=r"pipe or a device|No such device"):
        read_image_file(tmp_path / "image.jpg")


def test_a_device_is_refused_at_once():
    with pytest.raises(BadImageError, match="write the image into a file and pass that"):
        read_image_file("/dev/zero")


def test_a_huge_file_is_bad_and_not_read(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg")
    monkeypatch.setattr(datasets, "MAX_FILE_BYTES", 3)
    with pytest.raises(BadImageError, match="5 bytes, more than 3"):
        ImageFolder(tmp_path).read(0)
