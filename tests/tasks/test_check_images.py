"""Images and masks are looked at once, before training, by all ranks."""

import os
import signal
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from beit_fast.data.sources.segmentation import open_segmentation
from beit_fast.tasks import check_images
from beit_fast.tasks.check_images import check_segmentation, remembered_in, warn_of_turned
from beit_fast.tasks.sources import describe_source
from beit_fast.train.stop import Interrupted, stop_signals
from beit_fast.train.world import World
from masked_images import encoded, picture, write_pairs
from task_runs import ALONE, told_in_a_read


class Ranks(World):
    """One of two ranks in threads of a process, which meet in `gather`."""

    met = threading.Barrier(2, timeout=30)
    values: tuple[list, list] = [None] * 2, [None] * 2

    def gather(self, value):
        self.values[0][self.rank] = value
        self.met.wait()
        gathered = list(self.values[0])
        self.met.wait()
        return gathered


@pytest.fixture
def source(tmp_path):
    images, masks = write_pairs(tmp_path / "data", 20)
    return open_segmentation(images, masks=masks, num_classes=6)


@pytest.fixture
def check(source, tmp_path):
    def check(world=ALONE, kind="training", **options):
        check_segmentation(
            source, kind, num_threads=2, world=world, folder=tmp_path / "run", **options
        )

    return check


@pytest.fixture
def spoil(source):
    """Two bad pairs; gives back what makes them whole."""
    before = {}
    for path, content in (
        (source.mask_name(4), encoded(picture(41, 56)[..., 0] | 8)),
        (source.name(17), b"<html>"),
    ):
        with open(path, "rb") as file:
            before[path] = file.read()
        with open(path, "wb") as file:
            file.write(content)

    def repair():
        for path, content in before.items():
            with open(path, "wb") as file:
                file.write(content)

    return repair


def test_whole_pairs_are_looked_at_once_and_remembered(check, source, tmp_path, monkeypatch):
    check()
    check(kind="test")
    assert remembered_in(tmp_path / "run", "training") != remembered_in(tmp_path / "run", "test")
    monkeypatch.setattr(check_images, "unusable_images", lambda *_, **__: pytest.fail("again"))
    check()
    check(kind="test")


@pytest.mark.parametrize("kind", ["training", "test"])
def test_pairs_that_cannot_be_used_are_named_before_the_first_step(
    check, source, tmp_path, spoil, kind
):
    with pytest.raises(ValueError, match=r"^.*\Z") as error:
        check(kind=kind)
    said = str(error.value)
    assert said.startswith(f"2 of 20 {kind} images cannot be used: {source.name(4)} (the mask has")
    assert f"; {source.name(17)} (not a JPEG" in said
    remedies = {
        "training": "remove them: --data.max_bad_share allows 0",
        "test": "Repair or remove them: every one counts",
    }
    assert remedies[kind] in said
    assert not remembered_in(tmp_path / "run", kind).exists()
    spoil()  # repaired
    check(kind=kind)


def test_a_share_of_bad_pairs_is_borne_as_the_error_says(check, spoil, caplog):
    with pytest.raises(ValueError, match="max_bad_share allows 1"):
        check(max_bad_share=0.05)
    check(max_bad_share=0.1)
    assert [record.name for record in caplog.records] == ["beit_fast.data"] * 2
    assert "04.bmp" in caplog.text
    assert "17.bmp" in caplog.text


def test_one_reason_of_many_images_is_said_once(check, source):
    for index in range(20):
        with open(source.mask_name(index), "wb") as file:
            file.write(encoded(picture(42, 57)))
    with pytest.raises(ValueError, match="20 of 20 training images") as error:
        check()
    assert str(error.value).count("coded in colours") == 1
    assert "00.bmp" in str(error.value)
    assert "04.bmp (the mask is coded" in str(error.value)
    assert "and 15 more" in str(error.value)


def turned(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif)


def test_images_that_exif_turns_are_named_once_and_the_remedy_works(check, source, caplog):
    for index in (3, 11):  # 3: upside down, which no size shows
        image = np.array(Image.open(source.name(index)))
        with open(source.name(index), "wb") as file:
            file.write(turned(image, 3))
    check(kind="test")
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "2 of 20 test images have an EXIF orientation, which is not applied "
        f"({source.name(3)}, {source.name(11)}): "
    )
    check(kind="test")  # remembered
    assert len(caplog.records) == 1
    caplog.clear()
    for index in (3, 11):
        upright = ImageOps.exif_transpose(Image.open(source.name(index)))
        upright.save(source.name(index), "JPEG")
    check(kind="test")
    assert not caplog.records


def test_of_many_that_exif_turns_the_first_are_named_and_the_rest_counted(caplog):
    warn_of_turned([f"{n}.jpg" for n in range(8)], 9, "images")
    assert "8 of 9 images have" in caplog.text
    assert "(0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 3 more)" in caplog.text


def run_ranks(check) -> list[Exception | None]:
    """What becomes of each of two ranks."""
    outcomes: list[Exception | None] = [None, None]

    def run(rank):
        try:
            check(Ranks(rank, 2, torch.device("cpu")))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_ranks_share_the_pairs_and_the_verdict(check, source, spoil, monkeypatch):
    looked = []
    decode_pair = check_images.decode_pair

    def noted(image, mask, labels):
        looked.append(image)
        return decode_pair(image, mask, labels)

    monkeypatch.setattr(check_images, "decode_pair", noted)
    first, second = run_ranks(check)
    assert len(looked) == 20
    assert str(first) == str(second)
    assert str(first).startswith("2 of 20 training images")
    spoil()
    assert run_ranks(check) == [None, None]


def test_a_stop_signal_ends_the_look(check, tmp_path):
    with stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM while looking at the training images"):
            check()
    assert not remembered_in(tmp_path / "run", "training").exists()
    check()


@pytest.mark.promise("R17")
def test_a_stop_signal_ends_the_wait_for_a_read(check, source, tmp_path):
    with told_in_a_read(type(source), 7), stop_signals():
        check()
    assert not remembered_in(tmp_path / "run", "training").exists()
    check()


def test_the_line_of_a_source_has_its_classes_and_masks_without_an_image(source, tmp_path):
    os.unlink(source.name(7))
    images, masks = tmp_path / "data/images", tmp_path / "data/masks"
    found = open_segmentation(images, masks=masks)
    said = "19 images, 6 classes, 1 mask without an image left out"
    assert describe_source(found, found.classes) == f"{images}: {said}"
