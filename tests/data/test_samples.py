from dataclasses import replace

import numpy as np
import pytest

from beit_fast.data.config import MaskingConfig
from beit_fast.data.masking import draw_mask
from beit_fast.data.samples import PretrainSample, TokenizerSample, masked_index
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.views.config import SingleViewConfig, ViewConfig
from beit_fast.data.views.two_views import two_views

VIEW = ViewConfig(size=(64, 96), token_size=(32, 48))
MASKING = MaskingConfig(num_masked=9, min_block=2)


@pytest.fixture
def data(make_image, make_file):
    return make_file(make_image(70, 80), "JPEG")


def test_a_pretraining_batch_has_the_documented_shapes_and_types(data):
    sample = PretrainSample(VIEW, MASKING, (4, 6))
    batch = sample.collate([sample(data, SampleSeed(0, 0, i)) for i in range(5)])
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        "images": ((5, 64, 96, 3), "uint8"),
        "token_images": ((5, 32, 48, 3), "uint8"),
        "mask": ((5, 24), "bool"),
        "masked_index": ((5 * 9,), "int32"),
        "jitter": ((5, 3, 3), "float32"),
    }
    assert sample.max_masked == 9


@pytest.mark.parametrize("changes", [{"kind": "reference"}, {"color_jitter": 0.0}], ids=str)
def test_a_batch_with_nothing_left_to_jitter_carries_no_jitter(data, changes):
    sample = PretrainSample(replace(VIEW, **changes), MASKING, (4, 6))
    batch = sample.collate([sample(data, SampleSeed(0, 0, 0))])
    assert batch.keys() == {"images", "token_images", "mask", "masked_index"}


def test_view_and_mask_are_those_of_the_sample_seed(data):
    seed = SampleSeed(3, 1, 4)
    sample = PretrainSample(VIEW, MASKING, (4, 6))
    made = sample.collate([sample(data, seed), sample(data, seed._replace(index=5))])
    views = two_views(data, VIEW, seed.rng("view"))
    assert views.keys() == {"images", "token_images", "jitter"}
    for name, array in views.items():
        assert np.array_equal(made[name][0], array)
    mask = draw_mask((4, 6), MASKING, seed.rng("mask"))
    assert np.array_equal(made["mask"][0], mask.reshape(-1))


def test_masked_index_lists_the_hidden_patches_of_the_flat_batch_then_padding():
    mask = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], bool)
    assert masked_index(mask, 3).tolist() == [1, 2, 8, 11, -1, -1, -1, -1, -1]
    assert masked_index(np.zeros((2, 4), bool), 2).tolist() == [-1] * 4
    assert masked_index(np.ones((2, 2), bool), 2).tolist() == [0, 1, 2, 3]
    assert masked_index(np.zeros((0, 4), bool), 2).tolist() == []


def test_masked_index_always_fits_its_buffer():
    for strategy in ("block", "block_paper", "block_exact", "random"):
        masking = MaskingConfig(strategy=strategy)
        sample = PretrainSample(ViewConfig(), masking, (14, 14))
        mask = np.stack(
            [
                draw_mask((14, 14), masking, SampleSeed(0, 0, i).rng("mask")).reshape(-1)
                for i in range(64)
            ]
        )
        index = masked_index(mask, sample.max_masked)
        assert index.shape == (64 * sample.max_masked,)
        real = index[index >= 0]
        assert np.array_equal(real, np.flatnonzero(mask))
        assert (index[len(real) :] == -1).all()


def test_a_tokenizer_batch_is_one_view(data):
    sample = TokenizerSample(SingleViewConfig(size=48))
    batch = sample.collate([sample(data, SampleSeed(0, 0, i)) for i in range(3)])
    assert batch.keys() == {"images"}
    assert batch["images"].shape == (3, 48, 48, 3)
    assert not np.array_equal(batch["images"][0], batch["images"][1])


@pytest.mark.parametrize(
    ("view", "masking", "grid", "message"),
    [
        (ViewConfig(size=200), MaskingConfig(), (14, 14), "does not split into a grid"),
        (ViewConfig(token_size=100), MaskingConfig(), (14, 14), "token_size=100x100"),
        (VIEW, MaskingConfig(num_masked=75), (4, 6), "has 24 patches"),
    ],
)
def test_a_view_or_mask_that_does_not_fit_the_grid_is_refused(view, masking, grid, message):
    with pytest.raises(ValueError, match=message):
        PretrainSample(view, masking, grid)
