"""Training batches of a classifier: the same whatever the threads, and from any start."""

import numpy as np
import pytest
import torch

from beit_fast.data.loader import Loader
from beit_fast.data.sources.class_folders import class_folders
from beit_fast.data.views.augment import AugmentedSample
from beit_fast.data.views.config import AugmentConfig
from beit_fast.data.views.statistics import HALF_MEAN
from labelled_images import write_class_folders

SIZE = (24, 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return class_folders(write_class_folders(tmp_path_factory.mktemp("images"), 5, 0))[0]


def read(source, num_batches, start=0, num_threads=2, batch_size=5, **augment):
    sample = AugmentedSample(SIZE, AugmentConfig(**augment), HALF_MEAN)
    loader = Loader(source, sample, batch_size=batch_size, seed=3, num_threads=num_threads)
    batches = loader.batches(start)
    try:
        return [next(batches) for _ in range(num_batches)]
    finally:
        batches.close()


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_batches_depend_on_neither_threads_nor_start(source, num_threads):
    expected = read(source, 6)
    got = read(source, 4, start=2, num_threads=num_threads)
    for ours, theirs in zip(got, expected[2:], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


def test_a_batch_holds_images_boxes_and_one_mix(source):
    (batch,) = read(source, 1)
    assert batch["images"].shape == (5, *SIZE, 3)
    assert batch["images"].dtype == torch.uint8
    assert (batch["erase"].shape, batch["erase"].dtype) == ((5, 4), torch.int32)
    assert (batch["mix_weights"].shape, batch["mix_box"].shape) == ((2,), (4,))
    plain = read(source, 1, erase=0.0, mixup=0.0, cutmix=0.0)[0]
    assert plain.keys() == {"images", "sample_index"}
    assert torch.equal(plain["images"], batch["images"])  # each draws from numbers of its own


def test_epochs_augment_anew_and_rand_augment_changes_the_crop_alone(source):
    batches = read(source, 6)
    weights = torch.stack([batch["mix_weights"] for batch in batches])
    assert len(weights.unique(dim=0)) == len(batches)
    first, second = ({}, {})
    for seen, part in ((first, batches[:3]), (second, batches[3:])):
        for batch in part:
            seen |= dict(zip(batch["sample_index"].tolist(), batch["images"], strict=True))
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[index], second[index]) for index in first)
    plain = read(source, 6, rand_augment=None)
    same = [
        np.array_equal(a, b)
        for ours, theirs in zip(batches, plain, strict=True)
        for a, b in zip(ours["images"], theirs["images"], strict=True)
    ]
    assert 0.1 < np.mean(same) < 0.5  # neither of the two happens to one image in four
