import io
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data import samples, seeds
from beit_fast.data.views import two_views

DOCS = Path(__file__).resolve().parents[2] / "docs"
# webdataset leaves its last tar open
leaves_a_file = pytest.mark.filterwarnings("ignore:unclosed file .*images.tar:ResourceWarning")


@pytest.fixture
def images(bench):
    return bench("data_images").InMemory(None)


@pytest.fixture
def peers(bench, monkeypatch):
    peers = bench("data_peers")
    monkeypatch.setattr(peers, "BATCH_SIZE", 4)
    return peers


def test_broken_files_of_a_folder_are_left_out_and_named(bench, images, tmp_path, capsys):
    first, cut, last = images.read(0), images.read(1)[:5000], images.read(2)
    for number, data in enumerate([first, cut, last]):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    left = bench("data_images").InMemory(tmp_path)
    assert {left.read(0), left.read(1)} == {first, last}
    assert len(left) == 2
    assert f"left out: {tmp_path / '1.jpg'} (OSError: image file is" in capsys.readouterr().out
    for name in ("0.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 3 images of .* can be decoded"):
        bench("data_images").InMemory(tmp_path)


def shapes_of(batch):
    """(colours, side) of every view of a batch that has them, whatever the order of its axes."""
    views = batch.values() if isinstance(batch, dict) else batch
    views = [np.asarray(view) for view in views]
    if views[0].ndim == 3:  # a single tensor is a sequence of its images
        views = [np.stack(views)]
    return {
        (view.shape[0], *sorted(view.shape[1:])): view.dtype for view in views if view.ndim == 4
    }


@leaves_a_file
@pytest.mark.parametrize("what", ["one view", "two views", "two views, no jitter"])
def test_every_loader_makes_the_same_views_as_bytes(peers, images, tmp_path, what):
    wanted = {(4, 3, side, side): np.uint8 for side in ((224,) if "one" in what else (112, 224))}
    loaders = {**peers._ours(images, what), **peers._peers(images, what, tmp_path)}
    assert {"ours", "torchvision", "torchvision, tensors", "webdataset"} <= set(loaders)
    assert ("timm" in loaders) == (what == "one view")
    for name, batches in loaders.items():
        assert shapes_of(next(batches)) == wanted, name
        if hasattr(batches, "close"):
            batches.close()


@leaves_a_file
@pytest.mark.parametrize(("mode", "format"), [("RGB", "PNG"), ("CMYK", "JPEG"), ("RGB", "BMP")])
def test_every_loader_takes_what_else_lies_among_photographs(bench, peers, tmp_path, mode, format):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new(mode, (60, 50)).save(folder / "odd.jpg", format)
    images = bench("data_images").InMemory(folder)
    for what in ("one view", "two views"):
        for batches in {
            **peers._ours(images, what),
            **peers._peers(images, what, tmp_path),
        }.values():
            next(batches)
            if hasattr(batches, "close"):
                batches.close()


@leaves_a_file
def test_loaders_are_told_with_ours_first_and_the_cores_that_a_gpu_wants(peers, images):
    rows = peers.bench_loaders(images, "one view", 1, [3000, 700], None)
    assert [row["case"] for row in rows][:2] == ["ours", "torchvision"]
    assert rows[0]["ours by it"] == 1
    for row in rows:
        assert row["low"] <= row["median"] <= row["high"]
        assert row["cores for 700/s"] == pytest.approx(700 / row["median"])
        assert row["ours by it"] == pytest.approx(rows[0]["median"] / row["median"])
    assert "DALI" not in [row["case"] for row in rows]


def test_a_python_without_dali_is_named(peers, images):
    with pytest.raises(RuntimeError, match="has no DALI"):
        peers.bench_loaders(images, "one view", 1, [3000], sys.executable)


def test_stages_are_all_of_a_sample_and_leave_the_package_as_it_was(bench, images):
    stages = bench("data_stages")
    before = two_views.decode_fast, two_views._resize, samples.draw_mask
    rows = {row["case"]: row for row in stages.bench_stages(images, 2, batch_size=8)}
    assert (two_views.decode_fast, two_views._resize, samples.draw_mask) == before
    assert set(stages.STAGES) | {"rest", "batch", "loader", "all"} == set(rows)
    assert all(rows[name]["us an image"] > 0 for name in stages.STAGES)
    assert rows["decode"]["share"] > rows["mask"]["share"]
    assert rows["all"]["share"] == 1


def test_what_holds_the_lock_is_all_but_decode_resize_and_copies(bench, images):
    lock = bench("data_lock")
    before = two_views.flip_view, torch.nn.functional.interpolate, np.stack, seeds.SampleSeed.rng
    rows = {row["case"]: row for row in lock.held_by_image(images, 2, batch_size=8)}
    after = two_views.flip_view, torch.nn.functional.interpolate, np.stack, seeds.SampleSeed.rng
    assert after == before
    assert set(lock.PIECES) | {"rest", "batch", "loader", "all"} == set(rows)
    held = {name: row["us with the lock"] for name, row in rows.items()}
    stages = {
        row["case"]: row for row in bench("data_stages").bench_stages(images, 2, batch_size=8)
    }
    assert 0 < held["decode"] < 0.2 * stages["decode"]["us an image"]
    assert 0 < held["resize"] < 0.5 * stages["resize"]["us an image"]
    assert rows["all"]["images per second at most"] == pytest.approx(1e6 / held["all"])
    assert rows["mask"]["images per second at most"] == ""


def test_a_call_that_releases_the_lock_counts_with_what_it_holds(bench):
    held = bench("data_lock")._Held()
    held.begin()
    busy = held.releasing(lambda: sum(range(3_000_000)), holds=0.001)
    start = time.thread_time()
    busy()
    taken = time.thread_time() - start
    assert 0.001 < held.seconds < 0.001 + 0.2 * taken


def test_a_loader_whose_threads_sleep_gives_no_more_than_as_many_cores_would(bench, images):
    (row,) = bench("data_lock").asleep(images, threads=(2,), batch_size=16)
    assert 0 < row["images per second"] <= 1.05 * row["as many cores would give"]


def test_mosaics_are_large_and_not_enlarged(bench, images):
    (data,) = bench("data_images").mosaics(images, 2, 1)
    image = Image.open(io.BytesIO(data))
    assert image.size == (1000, 666)
    assert len(data) > 100_000


def test_large_photographs_are_shrunk_and_told_with_their_distance(bench, images):
    distance = bench("data").distance
    rows = {r["case"]: r for r in bench("data_stages").bench_scaled(images, 1, distance, (1, 4))}
    sizes = ("500x333", "2000x1332")
    assert list(rows) == [f"{size}, {how}" for size in sizes for how in ("full", "scaled")]
    assert all(rows[f"{size}, full"]["x full"] == 1 for size in sizes)
    assert rows["500x333, scaled"]["shrunk"] == 0
    assert rows["500x333, scaled"]["PSNR 224"] == ""
    large = rows["2000x1332, scaled"]
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    views = " and ".join(f"{large[f'PSNR {side}']:.0f} dB" for side in (224, 112))
    assert re.search(views.replace(" and ", " from .* at 224 px, ") + " at 112 px", text)
    assert f"2000 x 1332 pixels, {large['shrunk']:.0%} of them shrunk".replace("%", " %") in text
