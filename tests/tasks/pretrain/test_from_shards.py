"""The demo trained from tar shards in the published layout, killed on two ranks, resumed on one."""

import json
import signal
import subprocess
import sys

import pytest

import shard_ranks
from shard_ranks import BATCH, KILLED, ORDERS, SHARDS, STEPS, notes_of
from shards import write_shards
from task_runs import records_of

NUM_IMAGES = 7 * 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("runs")
    write_shards(folder / SHARDS, 7, 8, name="imagenet1k-train-{:04d}.tar")
    command = [sys.executable, shard_ranks.__file__, str(folder), str(tokenizer_file)]
    done = subprocess.run(command, timeout=300, capture_output=True, text=True)
    said = "".join(path.read_text() for path in folder.glob("said_*"))
    assert done.returncode == 0, done.stderr + said
    killed = [[-signal.SIGKILL, -signal.SIGKILL], [0], [0]]
    assert json.loads(done.stdout) == dict.fromkeys(ORDERS, killed), said
    return folder


@pytest.mark.promise("R2")
@pytest.mark.parametrize("order", ORDERS)
def test_a_run_from_shards_killed_on_two_ranks_goes_on_with_one(runs, order):
    whole = {n["first"]: n for n in notes_of(runs / f"{order}_whole")}
    images = [name for note in whole.values() for name in note["images"]]
    pixels = [value for note in whole.values() for value in note["pixels"]]
    assert len(images) >= STEPS * BATCH > 2 * NUM_IMAGES
    for epoch in (0, 1):
        assert len({*images[epoch * NUM_IMAGES : (epoch + 1) * NUM_IMAGES]}) == NUM_IMAGES
    seen = set()
    for note in notes_of(runs / order):
        first, last = note["first"], note["first"] + len(note["images"])
        assert note["images"] == images[first:last]
        assert note["pixels"] == pixels[first:last]
        seen |= {(len(note["images"]), number) for number in range(first, last)}
    by_two = {number for size, number in seen if size == BATCH // 2}
    by_one = {number for size, number in seen if size == BATCH}
    assert by_two >= {*range((KILLED - 1) * BATCH)}
    assert by_one >= {*range((KILLED - 1) * BATCH, STEPS * BATCH)}
    assert min(by_one) > 0  # it was gone on with
    ours, theirs = records_of(runs / order), records_of(runs / f"{order}_whole")
    assert [line["step"] for line in ours] == [*range(1, STEPS + 1)]
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-6)
        assert our["accuracy"] == pytest.approx(their["accuracy"], rel=1e-6)


def test_a_window_is_another_order_of_few_shards(runs):
    passes = {}
    for order in ORDERS:
        notes = notes_of(runs / f"{order}_whole")
        passes[order] = [name for note in notes for name in note["images"]][:NUM_IMAGES]
    assert sorted(passes["window"]) == sorted(passes["full"])
    assert passes["window"] != passes["full"]
    shards = {order: [name.rsplit("/", 2)[1] for name in names] for order, names in passes.items()}
    assert all(".tar" in shard for shard in shards["window"])
    assert len({*shards["window"][:16]}) <= 3 < len({*shards["full"][:16]})
