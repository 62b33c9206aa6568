"""Files that cannot be read: what the loader puts in their place, and when it stops."""

import io
import logging

import pytest
import torch
from PIL import Image

from beit_fast.data.bad_samples import BadDataError
from beit_fast.data.loader import Loader
from beit_fast.data.sources import reading
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.data.sources.limits import ReadConfig
from faults import LET_GO, Injector, fired
from loaded import SAMPLE, Faulty, Numbers, Seeds, assert_equal
from task_runs import take_batches

pytestmark = pytest.mark.promise("R14")


def test_a_loader_with_another_sample_knows_the_same_bad_files():
    loader = Loader(Numbers(100, bad=(41,)), Seeds(), batch_size=100, num_threads=0)
    other = loader.with_sample(Seeds())
    take_batches(other, 1)
    assert list(loader.bad_samples) == ["image-41"]


def spoil(folder) -> list[str]:
    """Five kinds of bad files among the 200."""
    paths = sorted(folder.rglob("*.jpg"))
    bad = [paths[10], paths[11], paths[57], paths[120], paths[199]]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(b"not an image\n" * 50)
    bad[2].write_bytes(bad[2].read_bytes()[:300])
    bad[3].write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    bad[4].unlink()
    bad[4].mkdir()  # opens with an OSError
    return [str(path) for path in bad]


def used(batches) -> torch.Tensor:
    return torch.cat([batch["sample_index"] for batch in batches])


def test_all_kinds_of_faults_are_met_alike_by_every_run(
    image_folder, tmp_path, monkeypatch, caplog
):
    """Empty, cut, no image, a read that hangs and one that fails are replaced; an image of another
    kind than its name says and a read that fails once are not."""
    monkeypatch.setattr(reading, "_PAUSE", 0.01)
    source = ImageFolder(image_folder)
    spoil(image_folder)
    image = Image.open(source.name(80))
    image.load()
    png = io.BytesIO()
    image.save(png, "PNG")
    with open(source.name(80), "wb") as file:
        file.write(png.getvalue())
    LET_GO.clear()
    faults = ["0:5:hang_read", "0:30:eio", "0:31:denied"]

    def run(name, count, start, num_threads):
        """One process: its batches and its bad files."""
        output = tmp_path.parent / f"{tmp_path.name}_{name}"
        output.mkdir()
        injector = Injector(output, faults)
        loader = Loader(
            Faulty(source, injector),
            SAMPLE,
            batch_size=25,
            num_threads=num_threads,
            reads=ReadConfig(read_timeout=0.5),
        )
        batches = take_batches(loader, count, start)
        assert fired(output) == dict.fromkeys(faults, 1)
        return batches, loader.bad_samples

    whole, bad = run("whole", 16, 0, 0)  # two passes
    again, bad_again = run("again", 16, 0, 3)
    resumed, bad_resumed = run("resumed", 11, 5, 2)
    LET_GO.set()
    assert_equal(again, whole)
    assert_equal(resumed, whole[5:])
    assert bad == bad_again == bad_resumed
    assert list(bad) == [source.name(index) for index in (5, 10, 11, 31, 57, 120, 199)]
    assert bad[source.name(5)] == "no answer within 0.5 s"
    assert "Permission denied" in bad[source.name(31)]
    counts = torch.bincount(used(whole), minlength=200)
    assert counts[[30, 80]].tolist() == [2, 2]
    assert counts[[6, 12, 32]].tolist() == [4, 6, 4]
    said = [record.getMessage() for record in caplog.records]
    assert sum("when it was tried again" in line for line in said) == 3  # once a run


def test_strict_a_read_that_hangs_stops_the_run_and_names_the_image(tmp_path):
    LET_GO.clear()
    loader = Loader(
        Faulty(Numbers(100), Injector(tmp_path, ["0:41:hang_read"])),
        Seeds(),
        batch_size=100,
        num_threads=1,
        max_bad_share=0,
        reads=ReadConfig(read_timeout=0.2),
    )
    with pytest.raises(BadDataError, match=r"image-41 \(no answer within 0.2 s\): 1 of 100 files"):
        take_batches(loader, 1)
    LET_GO.set()
    assert fired(tmp_path) == {"0:41:hang_read": 1}


@pytest.mark.parametrize("num_threads", [0, 3])
def test_bad_files_are_replaced_by_the_next_counted_and_named_once(
    image_folder, num_threads, caplog
):
    source = ImageFolder(image_folder)
    bad = spoil(image_folder)
    loader = Loader(source, SAMPLE, batch_size=25, num_threads=num_threads)
    with caplog.at_level(logging.WARNING, "beit_fast.data"):
        batches = take_batches(loader, 24)  # three passes
    assert list(loader.bad_samples) == bad
    assert "empty" in loader.bad_samples[bad[0]]
    for path in bad:
        assert sum(path in record.message for record in caplog.records) == 1
    for epoch in range(3):
        counts = torch.bincount(used(batches[8 * epoch : 8 * epoch + 8]), minlength=200)
        # 12 stands in for 10 and 11, 58 for 57, 121 for 120, and the first for the last
        expected = torch.ones(200, dtype=torch.int64)
        expected[[10, 11, 57, 120, 199]] = 0
        expected[12], expected[58], expected[121], expected[0] = 3, 2, 2, 2
        assert torch.equal(counts, expected)


def test_a_resumed_run_replaces_bad_files_alike(image_folder):
    source = ImageFolder(image_folder)
    spoil(image_folder)
    whole = take_batches(Loader(source, SAMPLE, batch_size=25, num_threads=0), 14)
    resumed = take_batches(Loader(source, SAMPLE, batch_size=25, num_threads=4), 9, 5)
    assert_equal(resumed, whole[5:])


def test_a_replacement_has_the_crop_and_mask_of_what_it_replaces():
    (batch,) = take_batches(Loader(Numbers(100, bad=(41,)), Seeds(), batch_size=100), 1)
    row = (batch["seed"][:, 2] == 41).nonzero().item()
    assert batch["read"][row] == batch["sample_index"][row] == 42


def test_a_known_bad_file_is_not_read_again():
    source = Numbers(100, bad=(41,))
    take_batches(Loader(source, Seeds(), batch_size=100, num_threads=0), 5)
    assert source.reads.count(41) == 1


@pytest.mark.parametrize(
    ("length", "max_bad_share", "num_allowed"),
    [
        (1000, 0.001, 10),
        (100, 0.001, 10),
        (50, 0.001, 5),
        (9, 0.001, 0),
        (1000, 0.05, 50),
        (1000, 0, 0),
    ],
)
def test_more_bad_files_than_allowed_stop_the_run(length, max_bad_share, num_allowed):
    def run(num_bad):
        source = Numbers(length, bad=tuple(range(0, 2 * num_bad, 2)))
        loader = Loader(source, Seeds(), batch_size=length, max_bad_share=max_bad_share)
        take_batches(loader, 1)

    run(num_allowed)
    with pytest.raises(BadDataError) as error:
        run(num_allowed + 1)
    message = str(error.value)
    assert f"{num_allowed + 1} of {length} files are bad" in message
    assert all(part in message for part in ("disk error", "image-", "raise --data.max_bad_share"))


def test_a_data_set_of_bad_files_alone_ends_with_an_error():
    loader = Loader(Numbers(5, bad=tuple(range(5))), Seeds(), batch_size=2, max_bad_share=1.0)
    with pytest.raises(BadDataError, match="none of the 5 images"):
        take_batches(loader, 1)
