import gc
import itertools
import random
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch

from beit_fast.data.config import MaskingConfig
from beit_fast.data.loader import Loader
from beit_fast.data.masking import draw_mask
from beit_fast.data.samples import PretrainSample, TokenizerSample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.data.views.config import SingleViewConfig, ViewConfig
from loaded import SAMPLE, Numbers, Seeds, assert_equal
from task_runs import take_batches


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if "grain" in t.name]


def assert_no_threads() -> None:
    end = time.monotonic() + 5  # those that never had a batch to read end by themselves
    while loader_threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert not loader_threads()


def test_batches_hold_the_arrays_of_the_sample_as_tensors(image_folder):
    (batch,) = take_batches(Loader(ImageFolder(image_folder), SAMPLE, batch_size=8), 1)
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "images": ((8, 32, 32, 3), torch.uint8),
        "token_images": ((8, 16, 16, 3), torch.uint8),
        "mask": ((8, 16), torch.bool),
        "masked_index": ((8 * 6,), torch.int32),
        "jitter": ((8, 3, 3), torch.float32),
        "sample_index": ((8,), torch.int64),
    }
    real = batch["masked_index"][batch["masked_index"] >= 0]
    assert torch.equal(real.long(), batch["mask"].flatten().nonzero()[:, 0])


@pytest.mark.promise("R1")
@pytest.mark.parametrize("num_threads", [0, 1, 4])
@pytest.mark.parametrize("start", [1, 6, 13], ids=["mid-pass", "pass-end", "second-pass"])
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(image_folder, num_threads, start):
    source = ImageFolder(image_folder)

    def loader(threads):
        return Loader(source, SAMPLE, batch_size=32, seed=3, num_threads=threads)

    whole = take_batches(loader(0), 16)
    assert_equal(take_batches(loader(num_threads), 16 - start, start), whole[start:])


def test_one_loader_can_be_iterated_twice_at_once(image_folder):
    loader = Loader(ImageFolder(image_folder), SAMPLE, batch_size=8, num_threads=2)
    first, second = loader.batches(), loader.batches(2)
    ours = [next(first) for _ in range(4)]
    assert_equal([next(second) for _ in range(2)], ours[2:])
    first.close()
    assert_equal([next(second)], take_batches(loader, 1, 4))
    second.close()


def test_each_pass_holds_every_image_once_in_another_order():
    batches = take_batches(Loader(Numbers(100), Seeds(), batch_size=30, num_threads=2), 10)
    read = torch.cat([batch["read"] for batch in batches]).tolist()
    assert read == torch.cat([batch["sample_index"] for batch in batches]).tolist()
    orders = [read[0:100], read[100:200], read[200:300]]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    epochs = torch.cat([batch["seed"][:, 1] for batch in batches]).tolist()
    assert epochs == [0] * 100 + [1] * 100 + [2] * 100


@pytest.mark.promise("R25")
def test_another_seed_gives_another_order_in_every_pass():
    def order(seed, start):
        return take_batches(Loader(Numbers(64), Seeds(), batch_size=64, seed=seed), 1, start)[0][
            "read"
        ]

    orders = [tuple(order(seed, epoch).tolist()) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 9


@pytest.mark.promise("R2")
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_a_global_batch_is_the_same_however_many_ranks_share_it(image_folder, world_size):
    source = ImageFolder(image_folder)
    whole = take_batches(Loader(source, SAMPLE, batch_size=24, seed=1), 10)
    ranks = [
        take_batches(
            Loader(
                source,
                SAMPLE,
                batch_size=24 // world_size,
                seed=1,
                rank=rank,
                world_size=world_size,
                num_threads=rank % 3,
            ),
            10,
        )
        for rank in range(world_size)
    ]
    for k, batch in enumerate(whole):
        for name in ("images", "token_images", "mask", "jitter", "sample_index"):
            assert torch.equal(torch.cat([rank[k][name] for rank in ranks]), batch[name])


@pytest.mark.promise("R2")
def test_accumulated_batches_of_one_process_are_those_of_two_ranks(image_folder):
    source = ImageFolder(image_folder)
    alone = take_batches(Loader(source, SAMPLE, batch_size=8), 40)
    ranks = [
        take_batches(Loader(source, SAMPLE, batch_size=8, rank=rank, world_size=2), 20)
        for rank in (0, 1)
    ]
    assert_equal([ranks[k % 2][k // 2] for k in range(40)], alone)


@pytest.mark.promise("R25")
def test_no_mask_and_no_crop_repeats_over_ranks_and_passes(image_folder):
    source = ImageFolder(image_folder)
    sample = PretrainSample(ViewConfig(size=112, token_size=56), MaskingConfig(), (14, 14))
    masks, images = set(), set()
    for rank in (0, 1):
        loader = Loader(source, sample, batch_size=20, rank=rank, world_size=2, num_threads=2)
        for batch in take_batches(loader, 10):  # two passes over 200 images
            masks.update(mask.numpy().tobytes() for mask in batch["mask"])
            images.update(image.numpy().tobytes() for image in batch["images"])
    assert len(masks) == len(images) == 400


@pytest.mark.promise("R25")
def test_no_two_of_ten_thousand_samples_have_the_same_seed_and_masks_repeat_by_chance_alone():
    """Two ranks, two threads and two passes; against generators that nothing relates."""
    grid, seeds, masks = (14, 14), set(), Counter()
    by_chance = Counter(
        draw_mask(grid, MaskingConfig(), random.Random(number)).tobytes()
        for number in range(10_000)
    )
    for rank in (0, 1):
        loader = Loader(
            Numbers(5000), Seeds(), batch_size=250, rank=rank, world_size=2, num_threads=2
        )
        for batch in take_batches(loader, 20):
            seeds.update(map(tuple, batch["seed"].tolist()))
    assert len(seeds) == 10_000
    for seed in seeds:
        masks[draw_mask(grid, MaskingConfig(), SampleSeed(*seed).rng("mask")).tobytes()] += 1
    # 33 of these repeat another one; 35 and 36 of two sets from plain generators.
    repeats, chance = (10_000 - len(found) for found in (masks, by_chance))
    assert 0 < chance < 100
    assert repeats < 2 * chance
    assert max(masks.values()) <= 2 * max(by_chance.values())


@pytest.mark.parametrize("num_images", [1, 3, 16])
def test_a_data_set_smaller_than_a_batch_repeats_within_it(num_images):
    loader = Loader(Numbers(num_images), Seeds(), batch_size=64)
    (batch,) = take_batches(loader, 1)
    counts = torch.bincount(batch["read"], minlength=num_images)
    assert counts.max() - counts.min() <= 1
    assert len(set(map(tuple, batch["seed"].tolist()))) == 64
    assert loader.batches_per_epoch == 1


def test_batches_per_epoch_counts_whole_batches_of_one_rank():
    loader = Loader(Numbers(1001), Seeds(), batch_size=50, rank=1, world_size=4)
    assert loader.batches_per_epoch == 5


def test_a_run_may_start_anywhere():
    (batch,) = take_batches(Loader(Numbers(7), Seeds(), batch_size=1), 1, start=10**9)
    assert batch["seed"][0, 1] == 10**9 // 7


def test_a_tokenizer_sample_is_loaded_by_the_same_loader(image_folder):
    loader = Loader(
        ImageFolder(image_folder), TokenizerSample(SingleViewConfig(size=32)), batch_size=4
    )
    (batch,) = take_batches(loader, 1)
    assert batch["images"].shape == (4, 32, 32, 3)


def test_batches_in_order_have_the_crops_of_their_pass_and_replace_bad_files_alike():
    source = Numbers(100, bad=(41, 59))
    loader = Loader(source, Seeds(), batch_size=8, seed=2, rank=1, world_size=3, num_threads=2)
    batches = list(loader.batches_in_order(5, 40, 60))
    assert [len(batch["read"]) for batch in batches] == [8, 8, 4]
    assert torch.cat([b["seed"] for b in batches]).tolist() == [[2, 5, i] for i in range(40, 60)]
    read = torch.cat([batch["sample_index"] for batch in batches]).tolist()
    assert read == [40, 42, *range(42, 59), 60]
    assert list(loader.bad_samples) == ["image-41", "image-59"]
    assert list(loader.batches_in_order(0, 7, 7)) == []
    assert_no_threads()


def test_images_smaller_than_the_tokenizers_crop_are_read_as_all_others(image_folder):
    loader = Loader(
        ImageFolder(image_folder), TokenizerSample(SingleViewConfig(size=64)), batch_size=4
    )
    (batch,) = take_batches(loader, 1)
    assert batch["images"].shape == (4, 64, 64, 3)
    assert loader.bad_samples == {}


# Threads


@pytest.mark.parametrize("how", ["close", "drop", "error"])
def test_no_thread_is_left(how, image_folder):
    loader = Loader(ImageFolder(image_folder), SAMPLE, batch_size=16, num_threads=4)
    batches = loader.batches()
    next(batches)
    assert len(loader_threads()) == 4
    if how == "close":
        batches.close()
    elif how == "drop":
        del batches
        gc.collect()
    else:
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
    assert_no_threads()


def test_closing_stops_reading_at_once_and_not_after_the_batches_read_ahead():
    begun = []

    class Slow(Seeds):
        def __call__(self, data, seed):
            begun.append(seed)
            time.sleep(0.02)
            return super().__call__(data, seed)

    batches = Loader(Numbers(1000), Slow(), batch_size=50, num_threads=4).batches()
    next(batches)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 0.5  # a batch takes a second, a sample 0.02
    num_begun = len(begun)
    time.sleep(0.1)
    assert len(begun) == num_begun
    assert_no_threads()


@pytest.mark.parametrize("num_threads", [0, 4])
def test_an_error_in_a_thread_reaches_the_consumer_and_names_the_image(num_threads):
    class Broken(Seeds):
        def __call__(self, data, seed):
            if seed.index == 33:
                raise ZeroDivisionError("a bug")
            return super().__call__(data, seed)

    batches = Loader(Numbers(100), Broken(), batch_size=10, num_threads=num_threads).batches()
    with pytest.raises(ZeroDivisionError, match="a bug") as error:
        list(itertools.islice(batches, 10))
    assert any("image-33 (sample 33, pass 0)" in note for note in error.value.__notes__)
    assert_no_threads()


def test_importing_grain_leaves_the_terminal_and_logging_alone(image_folder):
    code = (
        "import logging; from beit_fast.data.grain import import_grain; "
        "import_grain(); assert not logging.root.handlers; "
        "assert logging.getLogger('absl').level == logging.NOTSET"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2 of world_size=2"),
        ({"rank": -1}, "rank=-1"),
        ({"num_threads": -1}, "num_threads=-1"),
        ({"max_bad_share": 1.5}, "max_bad_share=1.5"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Loader(Numbers(10), Seeds(), **({"batch_size": 2} | options))


def test_an_empty_source_and_a_negative_start_are_refused():
    with pytest.raises(ValueError, match="data set is empty"):
        Loader(Numbers(0), Seeds(), batch_size=2)
    with pytest.raises(ValueError, match="start=-1"):
        Loader(Numbers(3), Seeds(), batch_size=2).batches(-1)
