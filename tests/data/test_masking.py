import math
import random
import runpy

import numpy as np
import pytest

from beit_fast.data import masking
from beit_fast.data.config import MaskingConfig
from beit_fast.data.masking import draw_mask, max_masked
from beit_fast.data.seeds import SampleSeed

SCRIPT = MaskingConfig()  # the authors' settings
GRID = (14, 14)


def script_mask(grid, config, rng):
    """The authors' loop written out on an array; (mask, number of blocks)."""
    height, width = grid
    mask = np.zeros(grid, bool)
    count = num_blocks = 0
    while count < config.num_masked:
        room = min(config.num_masked - count, config.max_block or config.num_masked)
        added = 0
        for _ in range(10):
            area = rng.uniform(config.min_block, room)
            aspect = math.exp(rng.uniform(*map(math.log, config.aspects)))
            bh, bw = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if bw < width and bh < height:
                top, left = rng.randint(0, height - bh), rng.randint(0, width - bw)
                block = mask[top : top + bh, left : left + bw]
                new = block.size - int(block.sum())
                if 0 < new <= room:
                    block[:] = True
                    added = new
                    break
        if added == 0:
            break
        count += added
        num_blocks += 1
    return mask, num_blocks


def draw_many(config, grid, count):
    return np.stack(
        [draw_mask(grid, config, SampleSeed(7, 0, i).rng("mask")) for i in range(count)]
    )


@pytest.mark.parametrize(
    ("grid", "config"),
    [
        (GRID, SCRIPT),
        ((24, 24), MaskingConfig(num_masked=220, min_block=16)),
        ((14, 20), MaskingConfig(num_masked=100)),  # wide
        ((20, 14), MaskingConfig(num_masked=100, max_block=30)),  # tall
        ((4, 4), MaskingConfig(num_masked=6, min_block=2)),
        (GRID, MaskingConfig(num_masked=40, min_aspect=0.5, max_aspect=1.5)),
    ],
    ids=["script", "384px", "wide", "tall-capped", "small", "aspects"],
)
def test_block_masks_are_bit_for_bit_those_of_the_script(grid, config):
    for i in range(300):
        expected, _ = script_mask(grid, config, random.Random(i))
        assert np.array_equal(draw_mask(grid, config, random.Random(i)), expected)


def test_block_masks_have_the_statistics_of_the_script():
    num_masks = 50_000
    masks = draw_many(SCRIPT, GRID, num_masks)
    counts = masks.sum((1, 2))
    # Spec section 3, over 200,000 draws. Five standard errors of this sample and that together.
    assert counts.mean() == pytest.approx(74.47, abs=5 * 0.99 / math.sqrt(num_masks / 1.25) + 0.005)
    assert counts.std() == pytest.approx(0.99, abs=0.03)
    for count, share in ((75, 0.666), (74, 0.231), (73, 0.049), (72, 0.035)):
        error = math.sqrt(share * (1 - share) * 1.25 / num_masks)
        assert (counts == count).mean() == pytest.approx(share, abs=5 * error + 0.0005)
    assert counts.max() == 75
    assert 60 <= counts.min() <= 66
    assert np.quantile(counts, 0.01) == 70
    hidden = masks.mean(0)
    assert hidden[0, 0] == pytest.approx(0.041, abs=0.006)
    assert hidden[0, 7] == pytest.approx(0.19, abs=0.012)
    assert hidden[7, 7] == pytest.approx(0.71, abs=0.015)
    # No side is favoured: the four corners, and the mask turned by a quarter.
    corners = hidden[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.ptp(corners) < 0.008
    assert np.abs(hidden - hidden.T).max() < 0.015


def test_a_block_mask_takes_four_blocks_in_the_mean():
    blocks = [script_mask(GRID, SCRIPT, SampleSeed(0, 0, i).rng("mask"))[1] for i in range(4000)]
    assert np.mean(blocks) == pytest.approx(4.12, abs=0.12)
    assert min(blocks) >= 1


def test_exact_block_masks_hide_the_target_and_keep_the_blocks():
    for i in range(500):
        blocks = draw_mask(GRID, SCRIPT, random.Random(i))
        exact = draw_mask(GRID, MaskingConfig(strategy="block_exact"), random.Random(i))
        assert exact.sum() == 75
        assert (blocks & ~exact).sum() == 0  # falls short only: nothing hidden is shown again


def test_paper_masks_are_those_of_algorithm_1():
    counts = draw_many(MaskingConfig(strategy="block_paper"), GRID, 10_000).sum((1, 2))
    assert counts.min() == 79  # the first above 0.4 * 196 = 78.4
    assert counts.max() <= 98
    assert counts.mean() == pytest.approx(84.6, abs=0.25)


def test_random_masks_hide_every_patch_equally_often():
    masks = draw_many(MaskingConfig(strategy="random"), GRID, 10_000)
    assert (masks.sum((1, 2)) == 75).all()
    share = 75 / 196
    assert np.abs(masks.mean(0) - share).max() < 5 * math.sqrt(share * (1 - share) / 10_000)


@pytest.mark.parametrize("strategy", ["block", "block_exact", "block_paper", "random"])
@pytest.mark.parametrize("grid", [(14, 14), (9, 21), (8, 8), (24, 24)])
def test_no_mask_exceeds_the_size_of_its_buffer(strategy, grid):
    config = MaskingConfig(strategy=strategy, num_masked=grid[0] * grid[1] // 3, min_block=9)
    masks = draw_many(config, grid, 400)
    assert masks.shape == (400, *grid)
    assert masks.dtype == np.bool_
    assert 0 < masks.sum((1, 2)).max() <= max_masked(grid, config) <= grid[0] * grid[1]


def test_the_buffer_for_paper_masks_is_no_larger_than_the_largest_mask():
    assert max_masked(GRID, MaskingConfig(strategy="block_paper")) == 98


def test_a_mask_depends_on_its_seed_alone():
    config = MaskingConfig()
    first = draw_mask(GRID, config, SampleSeed(1, 2, 3).rng("mask"))
    for _ in range(10):
        draw_mask(GRID, config, random.Random())
    assert np.array_equal(first, draw_mask(GRID, config, SampleSeed(1, 2, 3).rng("mask")))


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"num_masked": 1}, GRID, "num_masked is 1, below min_block=16"),
        ({"strategy": "block_exact", "num_masked": 8}, GRID, "below min_block"),
        ({"num_masked": 0, "strategy": "random"}, GRID, "at least 1"),
        ({"strategy": "checkerboard"}, GRID, "give block, block_exact, block_paper or random"),
        ({"min_aspect": 2.0}, GRID, "aspects"),
        ({"max_block": 10}, GRID, "max_block is 10, below min_block=16"),
        ({"num_masked": 197}, GRID, "has 196 patches: lower --masking.num_masked"),
        ({"num_masked": 20, "strategy": "random"}, (4, 4), "has 16 patches"),
        ({"num_masked": 16}, (4, 4), "fits a 4x4 grid: lower --masking.min_block"),
        ({"num_masked": 40, "min_block": 4}, (1, 196), "fits a 1x196 grid"),
        ({}, (0, 14), "no patches"),
    ],
)
def test_a_setting_that_cannot_mask_the_grid_is_refused(options, grid, message):
    with pytest.raises(ValueError, match=message):
        draw_mask(grid, MaskingConfig(**options), random.Random(0))
    with pytest.raises(ValueError, match=message):
        max_masked(grid, MaskingConfig(**options))


def test_the_module_draws_masks_when_run(capsys):
    runpy.run_path(masking.__file__, run_name="__main__")
    output = capsys.readouterr().out
    assert "block_paper" in output
    assert output.count("\n") > 4 * 14
