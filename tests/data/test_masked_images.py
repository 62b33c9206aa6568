"""The loader with images that have masks: order, resume, ranks, and pairs that cannot be used."""

import logging

import pytest
import torch

from beit_fast.data.bad_samples import BadDataError
from beit_fast.data.loader import Loader
from beit_fast.data.sources.segmentation import open_segmentation
from beit_fast.data.views.config import SegmentationViewConfig
from beit_fast.data.views.segmentation import SegmentationSample
from loaded import assert_equal
from masked_images import encoded, picture, write_pairs
from task_runs import take_batches


@pytest.fixture
def source(tmp_path):
    images, masks = write_pairs(tmp_path, 20)
    return open_segmentation(images, masks=masks)


def loader(source, **options) -> Loader:
    sample = SegmentationSample((24, 32), SegmentationViewConfig(scale=(160, 40)), source.labels)
    return Loader(source, sample, **{"batch_size": 4, "num_threads": 0, "seed": 3, **options})


def test_batches_hold_images_labels_and_extents(source):
    (batch,) = take_batches(loader(source, num_threads=2), 1)
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "images": ((4, 24, 32, 3), torch.uint8),
        "labels": ((4, 24, 32), torch.int16),
        "extent": ((4, 2), torch.int32),
        "sample_index": ((4,), torch.int64),
    }


@pytest.mark.parametrize("num_threads", [0, 3])
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(source, num_threads):
    whole = take_batches(loader(source), 12)
    assert_equal(take_batches(loader(source, num_threads=num_threads), 5, 7), whole[7:])


def test_ranks_share_the_batch_of_one(source):
    ours = [
        take_batches(loader(source, batch_size=2, rank=rank, world_size=2), 4) for rank in (0, 1)
    ]
    joined = [
        {name: torch.cat([one[name], other[name]]) for name in one}
        for one, other in zip(*ours, strict=True)
    ]
    assert_equal(joined, take_batches(loader(source), 4))


def test_a_pair_with_a_bad_image_or_mask_is_replaced_by_the_next_and_named(source, caplog):
    with open(source.name(3), "wb") as image, open(source.mask_name(8), "wb") as mask:
        image.write(b"not an image")
        mask.write(encoded(picture(42, 57)))  # in colours
    with caplog.at_level(logging.WARNING, "beit_fast.data"):
        ours = loader(source)
        batches = take_batches(ours, 10)  # two passes
    assert list(ours.bad_samples) == [source.name(3), source.name(8)]
    assert "not a JPEG" in ours.bad_samples[source.name(3)]
    assert "the mask is coded in colours" in ours.bad_samples[source.name(8)]
    assert len(caplog.records) == 2
    counts = torch.bincount(torch.cat([batch["sample_index"] for batch in batches]), minlength=20)
    expected = torch.full((20,), 2)
    expected[[3, 8]], expected[[4, 9]] = 0, 4
    assert torch.equal(counts, expected)
    assert_equal(take_batches(loader(source), 3, 7), batches[7:])
    with pytest.raises(BadDataError, match=r"--data\.max_bad_share 0 allows 0"):
        take_batches(loader(source, max_bad_share=0), 5)
