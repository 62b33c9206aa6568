"""The files of a token cache: what is written is read, and nothing else is taken for one."""

import json
import os
import pickle
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.config import MaskingConfig
from beit_fast.data.loader import Loader
from beit_fast.data.samples import CachedSample, PretrainSample, TokenViewSample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.data.token_cache import (
    MANIFEST,
    Manifest,
    TokenCache,
    TokenCacheError,
    check_made_from,
    damage,
    describe,
    read_manifest,
    record_dtype,
    write_manifest,
    write_shard,
)
from beit_fast.data.views.config import ViewConfig

VIEW = ViewConfig(size=(32, 48), token_size=(16, 24))
MASKING = MaskingConfig(num_masked=6, min_block=2)
GRID = (2, 3)
TOKENIZER = {"weights": "0" * 64, "precision": "fp32", "vocab_size": 65536}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(folder, records (views, images), source) of two views of 20 images, in files of 6."""
    folder, images = tmp_path_factory.mktemp("tokens"), tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(20):
        pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{number:02}.jpg")
    source = ImageFolder(images)
    loader = Loader(source, TokenViewSample(VIEW), batch_size=4, seed=3, num_threads=2)
    manifest = Manifest(describe(source, VIEW, GRID, 3, TOKENIZER), 2, 6, {}, {"torch": "2"})
    records, files = np.zeros((2, 20), record_dtype(6)), {}
    for shard in manifest.shards():
        part = records[shard.view, shard.first : shard.last]
        batches = list(loader.batches_in_order(*shard))
        for name in ("box", "flip", "seed", "num_bytes"):
            part[name] = np.concatenate([batch[name].numpy() for batch in batches])
        part["image"] = np.concatenate([batch["sample_index"].numpy() for batch in batches])
        part["ids"] = rng.integers(0, 65536, (len(part), 6))
        part["ids"][0, 0] = 65535
        files[shard.name] = write_shard(folder, shard, part)
    write_manifest(folder, replace(manifest, files=files))
    return folder, records, source


@pytest.fixture
def made(original, tmp_path):
    """A copy to damage."""
    folder, records, source = original
    return shutil.copytree(folder, tmp_path / "tokens"), records, source


def test_the_record_of_a_14_x_14_grid_has_425_bytes():
    assert record_dtype(196).itemsize == 425


def test_records_are_read_as_they_were_written(made):
    folder, records, _ = made
    assert len(list(folder.glob("*.npy"))) == 2 * 4
    cache = TokenCache(folder)
    for view in range(2):
        for index in (1, 5, 6, 11, 12, 19):
            for epoch in (view, view + 2, view + 2**40):
                assert cache.record(SampleSeed(3, epoch, index)) == records[view, index]
    assert cache.manifest.made_from["tokenizer"] == TOKENIZER
    assert cache.manifest.environment == {"torch": "2"}


def test_files_are_mapped_not_loaded(made):
    record = TokenCache(made[0]).record(SampleSeed(3, 0, 5))
    with pytest.raises(ValueError, match="read-only"):
        record["flip"] = True


def test_many_threads_read_at_once(made):
    folder, records, _ = made
    cache, wrong = TokenCache(folder), []

    def read(first):
        for index in [*range(first, 20, 4)] * 50:
            if cache.record(SampleSeed(3, 1, index)) != records[1, index]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_cached_batch_is_a_live_one_with_tokens_for_the_second_view(made):
    folder, records, source = made
    cached = CachedSample(VIEW, MASKING, GRID, TokenCache(folder), source.name)
    live = Loader(source, PretrainSample(VIEW, MASKING, GRID), batch_size=4, seed=3)
    ours, theirs = live.with_sample(cached).batches(), live.batches()
    for number in range(10):
        batch, expected = next(ours), next(theirs)
        del expected["token_images"]
        tokens = batch.pop("tokens")
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(batch[name], value), name
        assert str(tokens.dtype) == "torch.int32"
        index = expected["sample_index"].numpy()
        assert np.array_equal(tokens, records[number // 5, index]["ids"])
    ours.close()
    theirs.close()


def test_a_folder_that_moved_is_the_same_data_and_a_changed_one_is_not(image_folder):
    digest = ImageFolder(image_folder).digest()
    moved = image_folder.rename(image_folder.parent / f"{image_folder.name}_moved")
    assert ImageFolder(moved).digest() == digest
    first, second = sorted(moved.rglob("*.jpg"))[:2]
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    assert ImageFolder(moved).digest() != digest
    first.write_bytes(content)
    second.rename(second.with_suffix(".jpeg"))
    assert ImageFolder(moved).digest() != digest


@pytest.mark.parametrize("place", [0, -50, -1], ids=["header", "record", "last byte"])
def test_every_flipped_bit_is_seen_by_the_rank_that_checks_the_file(made, place):
    folder = made[0]
    path = sorted(folder.glob("*.npy"))[3]
    content = bytearray(path.read_bytes())
    content[place] ^= 8
    path.write_bytes(content)
    with pytest.raises(TokenCacheError, match=f"{path.name} is damaged: .*makes that file anew"):
        TokenCache(folder)
    with pytest.raises(TokenCacheError, match=path.name):
        TokenCache(folder, part=1, parts=2)
    if place:  # a header that differs is met by all
        TokenCache(folder, part=0, parts=2)


def test_a_missing_and_a_cut_file_are_named(made):
    folder = made[0]
    path = sorted(folder.glob("*.npy"))[5]
    content = path.read_bytes()
    for size in (0, 10, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(TokenCacheError, match=f"{path.name} cannot be read"):
            TokenCache(folder, part=0, parts=2)  # the other rank reads it for its digest
    path.unlink()
    with pytest.raises(TokenCacheError, match=f"{path.name} cannot be read"):
        TokenCache(folder)


@pytest.mark.promise("S1")
def test_nothing_is_unpickled(made, tmp_path):
    folder = made[0]
    manifest = read_manifest(folder)
    shard = next(manifest.shards())

    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "planted"),)

    with (folder / shard.name).open("wb") as file:
        np.save(file, np.array([Planted()] * 6, dtype=object), allow_pickle=True)
    for content in (None, pickle.dumps(Planted())):
        if content is not None:
            (folder / shard.name).write_bytes(content)
        with pytest.raises(TokenCacheError, match=shard.name):
            TokenCache(folder, part=1, parts=2)
    assert not (tmp_path / "planted").exists()


def test_an_array_of_another_kind_is_refused(made):
    folder = made[0]
    manifest = read_manifest(folder)
    shard = next(manifest.shards())
    for array in (np.zeros(6, record_dtype(5)), np.zeros(5, record_dtype(6)), np.zeros(6)):
        digest = write_shard(folder, shard, array)
        write_manifest(folder, replace(manifest, files=manifest.files | {shard.name: digest}))
        with pytest.raises(TokenCacheError, match=rf"{shard.name} holds .* belongs"):
            TokenCache(folder)


@pytest.mark.promise("S7")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format": 2}, "token cache format 2, this version reads 1"),
        (lambda m: {k: v for k, v in m.items() if k != "format"}, "is damaged: KeyError"),
        (lambda m: m | {"files": {"../../etc/passwd": "0"}}, "is no file of it"),
        (lambda m: m | {"num_views": 0}, "below 1"),
        (lambda m: m | {"images_per_shard": -5}, "below 1"),
        (lambda m: m | {"files": {"view_0000_image_00000000.npy": "0"}}, "is no file of it"),
        (lambda m: m | {"files": {f"view_{'9' * 5000}_image_00000000.npy": "0"}}, "is damaged"),
        (lambda m: m | {"num_views": "many"}, "is damaged: TypeError"),
        (lambda m: m | {"num_views": 2.0}, "is damaged: TypeError"),
        (lambda m: m | {"num_views": 10**18}, f"has 8 of {4 * 10**18} files: run the same"),
        (lambda m: m | {"made_from": m["made_from"] | {"grid": [10**9] * 3}}, "is damaged: "),
        (lambda m: m | {"made_from": m["made_from"] | {"grid": [10**9] * 2}}, "is damaged: "),
        (lambda m: m | {"surprise": 1}, "is damaged: TypeError"),
        (lambda m: m | {"made_from": {}}, "is damaged: KeyError"),
        (lambda m: [], "is damaged: "),
        (lambda m: m | {"files": dict(list(m["files"].items())[1:])}, "has 7 of 8 files"),
    ],
)
def test_a_manifest_that_is_none_is_refused(made, change, message):
    path = made[0] / MANIFEST
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(TokenCacheError, match=message):
        TokenCache(made[0])


def test_a_cut_manifest_and_an_empty_folder_are_refused(made, tmp_path):
    path = made[0] / MANIFEST
    path.write_text(path.read_text()[:100])
    with pytest.raises(TokenCacheError, match=f"{MANIFEST} is damaged"):
        TokenCache(made[0])
    with pytest.raises(TokenCacheError, match=r"is missing: make the tokens with `beit-fast pre"):
        TokenCache(tmp_path)


def test_every_difference_is_listed(tmp_path):
    theirs = {"seed": 0, "grid": [2, 3], "views": {"size": [1, 2], "kind": "fast"}, "old": 1}
    check_made_from(tmp_path, theirs, theirs)
    ours = {"seed": 1, "grid": [2, 3], "views": {"size": [1, 3], "kind": "fast"}, "new": None}
    with pytest.raises(TokenCacheError) as error:
        check_made_from(tmp_path, theirs, ours)
    assert (
        "(new was 'absent', is None; old was 1, is 'absent'; seed was 0, is 1; "
        "views.size was [1, 2], is [1, 3])"
    ) in str(error.value)


def test_a_write_that_fails_leaves_the_old_file_whole(made, monkeypatch):
    folder = made[0]
    manifest = read_manifest(folder)
    shard = next(manifest.shards())

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"{shard.name} not written \(\d+ MiB free\).*make room"):
        write_shard(folder, shard, np.zeros(6, record_dtype(6)))
    with pytest.raises(OSError, match=MANIFEST):
        write_manifest(folder, replace(manifest, files={}))
    assert damage(folder, shard.name, manifest.files[shard.name]) is None
    assert read_manifest(folder) == manifest
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))
