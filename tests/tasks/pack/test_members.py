"""One image as members of a tar."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.sources import tar_index
from beit_fast.data.sources.decode import BadImageError, decode_pillow
from beit_fast.tasks.pack import members
from beit_fast.tasks.pack.config import PackConfig
from beit_fast.tasks.pack.members import Packer, member, stem


def encoded(width, height, kind="PNG", mode="RGB", **options):
    rng = np.random.default_rng(width)
    coarse = rng.integers(0, 256, (4, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, kind, **options)
    return file.getvalue()


def files_of(blocks):
    """Name -> bytes, in order."""
    with tarfile.open(fileobj=io.BytesIO(blocks + bytes(1024))) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}


def pack(data, key="a/b.jpg", labels=(7,), place=3, **settings):
    config = PackConfig(images="images", shards="shards", **settings)
    blocks, is_resized = Packer(config, labels).members(place, 0, key, data)
    return files_of(blocks), is_resized


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 100_000])
def test_a_member_is_tarfiles_own_to_the_last_byte(size):
    data, name = bytes(size), "00000017_" + "n" * members._LONGEST_STEM + ".jpeg"
    info = tarfile.TarInfo(name)
    info.size = size
    header = info.tobuf(tarfile.USTAR_FORMAT)
    assert member(name, data) == header + data + bytes(-size % 512)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764_10026"),
        ("two.dots.in it.png", "two_dots_in_it"),
        ("a/Ärger ☃.jpg", "_rger__"),
        ("a/\udcff\udcfe.jpg", "__"),
        ("a/__meta__.jpg", "__meta__"),
        ("no ending", "no_ending"),
        ("s-0000.tar/00000012_lemur.jpg", "lemur"),  # packed before
        ("a/" + "x" * 300 + ".png", "x" * 80),
        ("a/..jpg", "_"),
        ("a/.jpg", "_jpg"),
    ],
)
def test_a_key_has_letters_that_every_reader_takes(key, said):
    assert stem(key) == said


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        *(("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")),
        *(("TIFF", "tif"), ("PPM", "ppm")),
    ],
)
def test_a_file_is_copied_and_called_what_it_is(kind, ending):
    data = encoded(50, 40, kind)
    files, is_resized = pack(data, key="a/wrong.name")
    assert list(files) == [f"00000003_wrong.{end}" for end in (ending, "cls", "json")]
    assert files[f"00000003_wrong.{ending}"] == data
    assert files["00000003_wrong.cls"] == b"7"
    described = {"filename": "a/wrong.name", "label": 7, "width": 50, "height": 40}
    assert json.loads(files["00000003_wrong.json"]) == described
    assert not is_resized


def test_without_labels_there_is_no_class():
    files, _ = pack(encoded(50, 40), labels=None)
    assert [name.rpartition(".")[2] for name in files] == ["png", "json"]
    assert "label" not in json.loads(files["00000003_b.json"])


def test_the_name_in_the_description_has_every_byte():
    files, _ = pack(encoded(50, 40), key="a/\udcff ☃\n.png")
    (name,) = (name for name in files if name.endswith(".json"))
    assert json.loads(files[name])["filename"] == "a/\udcff ☃\n.png"


@pytest.mark.parametrize(
    ("size", "short", "wanted"),
    [
        ((90, 60), 30, (45, 30)),
        ((60, 91), 30, (30, 46)),  # 45.5
        ((60, 60), 59, (59, 59)),
        ((60, 60), 60, None),
        ((60, 90), 61, None),
        ((1000, 20), 10, (500, 10)),
    ],
    ids=str,
)
def test_a_larger_image_is_made_smaller_by_lanczos_and_another_is_copied(size, short, wanted):
    data = encoded(*size)
    files, is_resized = pack(data, short_side=short, quality=77)
    assert is_resized == (wanted is not None)
    if wanted is None:
        assert files["00000003_b.png"] == data
        return
    image = decode_pillow(data).resize(wanted, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=77)
    assert files["00000003_b.jpg"] == file.getvalue()
    described = json.loads(files["00000003_b.json"])
    assert (described["width"], described["height"]) == wanted
    assert (described["original_width"], described["original_height"]) == size


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_what_is_made_smaller_is_the_image_that_training_sees(mode):
    data = encoded(90, 60, "JPEG", mode, comment=b"secret", quality=95)
    files, _ = pack(data, short_side=30)
    small = files["00000003_b.jpg"]
    assert b"secret" in data
    assert b"secret" not in small
    wanted = decode_pillow(data).resize((45, 30), Image.Resampling.LANCZOS)
    distance = np.abs(np.asarray(decode_pillow(small), np.int32) - np.asarray(wanted, np.int32))
    assert distance.mean() < 3  # levels, by JPEG at 90


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"no image", "not a JPEG"),
        (encoded(50, 40)[:-30], "truncated|OSError|SyntaxError"),
        (encoded(200, 300, "JPEG")[:1500], "truncated"),
        (encoded(100, 100), "more than max_pixels"),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "large"],
)
@pytest.mark.parametrize("short_side", [None, 30])
def test_what_training_could_not_use_is_refused(data, why, short_side):
    with pytest.raises(BadImageError, match=why):
        pack(data, max_pixels=9_000 if "pixels" in why else 64_000_000, short_side=short_side)


def test_a_file_that_would_not_be_read_from_a_shard_is_refused_and_smaller_it_is_not(monkeypatch):
    assert members.MOST_IMAGE_BYTES == tar_index.MOST_IMAGE_BYTES
    data = encoded(90, 60, "BMP")
    monkeypatch.setattr(members, "MOST_IMAGE_BYTES", len(data) - 1)
    with pytest.raises(BadImageError, match="pass --short_side"):
        pack(data)
    assert pack(data, short_side=30)[1]
