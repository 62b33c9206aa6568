"""Lists of images: what is kept of them, and how two differ."""

import dataclasses
import gzip
import os
import tracemalloc

import pytest

from beit_fast.data.listing import Listing, ListingError, path_of
from beit_fast.data.sources.digit_scenes import DigitScenes, LabelledScenes
from beit_fast.data.sources.digits import Digits
from beit_fast.data.sources.folder import SIZES_IN_DIGEST, ImageFolder
from beit_fast.data.sources.segmentation import MaskedFolder, numbered_classes
from beit_fast.data.sources.subset import Subset
from loaded import Numbers, Sharded

ODD = ["a/line\nbreak.jpg", os.fsdecode(b"a/latin\xe9.jpg"), "b/\u00fc\u20ac.jpg", "b/x.jpg"]


@pytest.fixture
def folder(tmp_path):
    """Files of odd names; a list needs no images."""

    def make(names=ODD, root="images"):
        for number, name in enumerate(names):
            path = tmp_path / root / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(bytes(number + 1))
        return ImageFolder(tmp_path / root)

    return make


def listed(source) -> Listing:
    return Listing.of(source)


def test_a_list_is_kept_once_and_read_as_it_was(folder, tmp_path):
    ours = listed(folder())
    ours.keep(tmp_path / "kept")
    path = path_of(tmp_path / "kept", ours.digest)
    before = path.stat().st_mtime_ns
    ours.keep(tmp_path / "kept")
    assert path.stat().st_mtime_ns == before
    assert [*path.parent.iterdir()] == [path]
    theirs = Listing.kept(tmp_path / "kept", ours.digest, 4)
    assert (theirs.names, theirs.sizes, theirs.digest) == (ours.names, ours.sizes, ours.digest)
    assert not theirs.difference(folder(), ours)


def test_it_is_the_same_wherever_the_folder_lies(folder, tmp_path):
    digest = listed(folder()).digest
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = ImageFolder(tmp_path / "moved")
    assert listed(moved).digest == digest
    (tmp_path / "moved" / "b" / "x.jpg").write_bytes(b"another")
    assert listed(moved).digest != digest


@pytest.mark.promise("R5")
def test_a_list_that_is_damaged_or_gone_is_named(folder, tmp_path):
    ours = listed(folder())
    with pytest.raises(ListingError, match=rf"{ours.digest}\.txt\.gz is missing"):
        Listing.kept(tmp_path, ours.digest, 4)
    ours.keep(tmp_path)
    path = path_of(tmp_path, ours.digest)
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-9], whole[:30] + b"\0\0" + whole[32:], b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ListingError, match="is damaged"):
            Listing.kept(tmp_path, ours.digest, 4)
    # Whole, and of other images; and one that unfolds to more than names can be.
    for content in (b'{"sizes": []}\na', bytes(2**22)):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ListingError, match="SHA-256 is not the one it is named by"):
            Listing.kept(tmp_path, ours.digest, 4)
    with pytest.raises(ListingError, match=r"'\.\./list' is no digest"):
        Listing.kept(tmp_path, "../list", 4)
    path.write_bytes(whole)
    with pytest.raises(ListingError, match="has 4 images, and 5 were wanted"):
        Listing.kept(tmp_path, ours.digest, 5)


def test_reading_a_list_takes_memory_for_what_is_there(folder, tmp_path):
    """Not for as many of the longest names as a manifest says there are."""
    listing = listed(folder())
    listing.keep(tmp_path / "kept")
    tracemalloc.start()
    try:
        with pytest.raises(ListingError, match="and 200000 were wanted"):
            Listing.kept(tmp_path / "kept", listing.digest, 200_000)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_a_difference_counts_and_names(folder, tmp_path):
    before = listed(folder())
    (tmp_path / "images" / "b" / "x.jpg").unlink()
    (tmp_path / "images" / "a" / "line\nbreak.jpg").write_bytes(b"another")
    source = folder([f"c/{number}.jpg" for number in range(5)])
    found = before.difference(source, listed(source))
    assert str(found) == (
        "5 images were added (c/0.jpg, c/1.jpg, c/2.jpg, ...), 1 image is gone (b/x.jpg), "
        "1 image has another size (a/line\\nbreak.jpg)"
    )
    assert found
    assert not found.is_repair
    names = [source.key(number) if number >= 0 else "gone" for number in found.numbers]
    assert names == [name if name != "b/x.jpg" else "gone" for name in before.names]
    (tmp_path / "images" / os.fsdecode(b"a/latin\xe9.jpg")).unlink()
    source = ImageFolder(tmp_path / "images")
    str(before.difference(source, listed(source))).encode()  # can be printed


def test_few_that_are_gone_or_repaired_are_a_repair(folder, tmp_path):
    names = [f"{number:03}.jpg" for number in range(100)]
    before = listed(folder(names))
    for name in names[:10]:
        (tmp_path / "images" / name).unlink()
    for name in names[10:20]:
        (tmp_path / "images" / name).write_bytes(bytes(500))
    source = ImageFolder(tmp_path / "images")
    assert before.difference(source, listed(source)).is_repair
    (tmp_path / "images" / names[20]).write_bytes(bytes(500))
    assert not before.difference(source, listed(source)).is_repair
    (tmp_path / "images" / names[20]).unlink()
    source = ImageFolder(tmp_path / "images")
    assert not before.difference(source, listed(source)).is_repair
    (tmp_path / "images" / names[0]).write_bytes(b"\0")
    (tmp_path / "images" / "new.jpg").write_bytes(b"")
    source = ImageFolder(tmp_path / "images")
    assert not before.difference(source, listed(source)).is_repair  # one was added


def test_a_size_that_cannot_be_had_is_no_difference(folder, tmp_path):
    source = folder()
    whole = listed(source)
    (tmp_path / "images" / "b" / "x.jpg").unlink()  # after the folder was read
    partly = listed(source)
    assert partly.sizes[2] is None
    assert partly.digest != whole.digest
    folder()
    assert not partly.difference(source, whole)


def test_another_order_is_a_difference():
    source = Numbers(5)
    turned = Listing([f"image-{n}" for n in (0, 1, 3, 2, 4)], {})
    found = turned.difference(source, listed(source))
    assert found
    assert not found.is_repair
    assert str(found) == "they are in another order"


def test_the_images_of_each_shard_are_kept_with_the_list(tmp_path):
    without, ours = listed(Numbers(9)), listed(Sharded([4, 0, 5]))
    assert ours.digest != without.digest
    ours.keep(tmp_path)
    assert Listing.kept(tmp_path, ours.digest, 9).shards == [4, 0, 5]
    without.keep(tmp_path)
    assert Listing.kept(tmp_path, without.digest, 9).shards is None
    for wrong in ([4, 4], [4, -1, 6], [4, "5"], 9):
        false = dataclasses.replace(ours, shards=wrong)
        false.keep(tmp_path)
        with pytest.raises(ListingError, match="is damaged"):
            Listing.kept(tmp_path, false.digest, 9)


def test_sizes_of_large_folders_are_spread_evenly():
    sizes = listed(Numbers(5 * SIZES_IN_DIGEST)).sizes
    assert list(sizes) == [5 * number for number in range(SIZES_IN_DIGEST)]


def test_every_kind_of_source_has_names_of_its_own(tmp_path, folder):
    images = folder(["a.jpg", "b.png"])
    masks = folder(["a.png", "b.png"], "masks")
    masked = MaskedFolder(images.root, masks.root, numbered_classes(2), ())
    subset = Subset(images, [1])
    assert [source.key(0) for source in (images, masked, subset)] == ["a.jpg", "a.jpg", "b.png"]
    assert [source.size(0) for source in (images, masked, subset)] == [1, 2, 2]
    digests = {
        listed(make(name)).digest
        for make in (Digits, DigitScenes, LabelledScenes)
        for name in (("digits:test:2", "digits:test:2:1") if make is Digits else
                     ("digit-scenes:test:2", "digit-scenes:test:3"))
    }  # fmt: skip
    assert len(digests) == 4  # of scenes alone, and of scenes with masks: the same scenes
