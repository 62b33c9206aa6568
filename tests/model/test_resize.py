import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit_fast.kernels.attention.rel_pos_bias import relative_position_rows
from beit_fast.model.resize import (
    _source_offsets,
    growth_ratio,
    resize_pos_embed,
    resize_rel_pos_table,
)


def table_of(grid, heads=2, dtype=torch.float64):
    return torch.randn(relative_position_rows(grid), heads, dtype=dtype)


def image_of(table, grid):
    """The table's patch part over (row offset, column offset)."""
    Gh, Gw = grid
    return table[:-3].view(2 * Gh - 1, 2 * Gw - 1, -1)


@pytest.mark.parametrize(
    ("src_pixels", "dst_pixels", "q"),
    [
        (224, 384, 1.0903074), (224, 480, 1.1250559), (224, 512, 1.1349178),
        (224, 640, 1.1685036), (224, 256, 1.0234928), (384, 512, 1.0261434),
        (384, 224, 1.0100009), (224, 192, 1.0100009),
    ],
)  # fmt: skip
def test_growth_ratios_are_those_of_the_original(src_pixels, dst_pixels, q):
    assert growth_ratio(src_pixels // 16, dst_pixels // 16) == pytest.approx(q, abs=5e-8)


def test_source_offsets_from_224_to_384_are_those_of_the_original():
    offsets = _source_offsets(14, 24)
    assert len(offsets) == 27
    assert np.array_equal(offsets, -offsets[::-1])
    positive = offsets[14:]
    assert positive[:4] == pytest.approx([1, 2.0903, 3.279, 4.575], abs=5e-4)
    assert positive[-3:] == pytest.approx([17.589, 20.178, 23.000], abs=5e-4)


def test_shrinking_overshoots_the_target_so_that_the_table_is_cropped():
    assert _source_offsets(24, 14)[-1] == pytest.approx(25.7, abs=0.05)
    assert _source_offsets(14, 12)[-1] == pytest.approx(13.8, abs=0.05)


@pytest.mark.parametrize(
    ("src", "dst"),
    [((14, 14), (24, 24)), ((24, 24), (14, 14)), ((4, 6), (7, 5)), ((1, 3), (2, 9))],
    ids=["grow", "shrink", "non-square", "one-row"],
)
def test_the_rows_of_cls_stay_and_the_size_is_that_of_the_new_grid(src, dst):
    table = table_of(src)
    resized = resize_rel_pos_table(table, src, dst)
    assert resized.shape == (relative_position_rows(dst), 2)
    assert torch.equal(resized[-3:], table[-3:])
    assert resized.isfinite().all()


def test_growing_keeps_the_bias_of_neighbouring_patches():
    src, dst = (14, 14), (24, 24)
    table = table_of(src)
    before, after = image_of(table, src), image_of(resize_rel_pos_table(table, src, dst), dst)
    for drow, dcol in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1)):
        torch.testing.assert_close(
            after[23 + drow, 23 + dcol], before[13 + drow, 13 + dcol], rtol=0, atol=1e-12
        )


def test_growing_carries_the_corner_to_the_corner():
    src, dst = (14, 14), (24, 24)
    table = table_of(src)
    before, after = image_of(table, src), image_of(resize_rel_pos_table(table, src, dst), dst)
    # The bisection stops 7e-5 patches short of the corner.
    torch.testing.assert_close(after[-1, -1], before[-1, -1], rtol=0, atol=1e-3)
    torch.testing.assert_close(after[0, -1], before[0, -1], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("src", "dst"), [((14, 14), (24, 24)), ((9, 5), (6, 8))])
def test_a_bias_smooth_in_the_offsets_is_sampled_at_the_geometric_axis(src, dst):
    # A product of cubics is its own interpolating spline, so every value is known.
    def bias(rows, columns):
        return (0.1 * rows**3 - rows)[:, None] * (1 + 0.2 * columns**2)[None, :] / 1000

    source = bias(*(_source_offsets(s, d) for s, d in zip(src, dst, strict=True)))
    table = torch.cat((torch.from_numpy(source).flatten()[:, None], torch.zeros(3, 1)))
    resized = image_of(resize_rel_pos_table(table, src, dst), dst)[..., 0]
    limits = [_source_offsets(s, d)[-1] for s, d in zip(src, dst, strict=True)]
    axes = [
        np.clip(np.arange(1 - d, d), -limit, limit) for d, limit in zip(dst, limits, strict=True)
    ]
    np.testing.assert_allclose(resized.numpy(), bias(*axes), rtol=0, atol=1e-10)


def test_rows_and_columns_are_resized_apart():
    src, dst = (5, 7), (9, 4)
    profile_rows, profile_columns = torch.randn(9).double(), torch.randn(13).double()
    image = profile_rows[:, None] * profile_columns[None, :]
    table = torch.cat((image.flatten()[:, None], torch.zeros(3, 1)))
    resized = image_of(resize_rel_pos_table(table, src, dst), dst)[..., 0]
    assert torch.linalg.matrix_rank(resized, rtol=1e-9) == 1
    turned = torch.cat((image.t().flatten()[:, None], torch.zeros(3, 1)))
    resized_turned = resize_rel_pos_table(turned, src[::-1], dst[::-1])
    torch.testing.assert_close(image_of(resized_turned, dst[::-1])[..., 0], resized.t())


def test_an_axis_that_keeps_its_size_keeps_its_values():
    table = table_of((5, 7))
    resized = resize_rel_pos_table(table, (5, 7), (9, 7))
    before, after = image_of(table, (5, 7)), image_of(resized, (9, 7))
    torch.testing.assert_close(after[8], before[4], rtol=0, atol=1e-12)  # row offset 0


def test_the_same_grid_gives_a_copy_in_the_same_dtype():
    table = table_of((4, 4), dtype=torch.bfloat16)
    copy = resize_rel_pos_table(table, (4, 4), (4, 4))
    assert torch.equal(copy, table)
    assert copy.data_ptr() != table.data_ptr()
    assert resize_rel_pos_table(table, (4, 4), (5, 5)).dtype == torch.bfloat16


def test_a_table_of_another_grid_is_refused_with_the_rows_it_should_have():
    with pytest.raises(ValueError, match="14x14 grid has 732 rows"):
        resize_rel_pos_table(torch.zeros(731, 2), (14, 14), (24, 24))


@pytest.mark.parametrize(
    ("src", "dst"), [((4, 4), (7, 7)), ((6, 4), (3, 5))], ids=["grow", "non-square"]
)
def test_absolute_positions_are_resized_bicubically_and_cls_stays(src, dst):
    pos_embed = torch.randn(1, 1 + src[0] * src[1], 8)
    resized = resize_pos_embed(pos_embed, src, dst)
    assert torch.equal(resized[:, 0], pos_embed[:, 0])
    for channel in range(8):
        image = pos_embed[0, 1:, channel].view(1, 1, *src)
        expected = F.interpolate(image, dst, mode="bicubic", align_corners=False)
        torch.testing.assert_close(resized[0, 1:, channel], expected.flatten())


def test_absolute_positions_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"4x4 grid are \(1, 17, D\)"):
        resize_pos_embed(torch.zeros(1, 16, 8), (4, 4), (7, 7))
    same = torch.randn(1, 17, 8)
    assert torch.equal(resize_pos_embed(same, (4, 4), (4, 4)), same)
