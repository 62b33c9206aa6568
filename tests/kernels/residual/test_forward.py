import pytest

from beit_fast.kernels.residual import backward as scale_residual_backward
from beit_fast.kernels.residual import forward as scale_residual_forward

WIDTHS = [1, 16, 37, 192, 200, 384, 768, 1024, 1280, 1408, 2048, 4096, 8192]


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("kernels", [scale_residual_forward, scale_residual_backward])
def test_tiles_cover_a_row_and_give_every_lane_16_bytes(kernels, D):
    tiles = kernels._tiles(D)
    assert tiles["CHUNK"] * tiles["NUM_CHUNKS"] >= D
    assert tiles["CHUNK"] * (tiles["NUM_CHUNKS"] - 1) < D
    assert tiles["ROWS"] * tiles["CHUNK"] >= 8 * 32 * tiles["num_warps"]  # 8 values of 16 bits


@pytest.mark.parametrize("D", [192, 384, 768, 1024, 2048])
@pytest.mark.parametrize("kernels", [scale_residual_forward, scale_residual_backward])
def test_no_lane_is_idle_at_the_widths_of_vision_transformers(kernels, D):
    tiles = kernels._tiles(D)
    assert tiles["CHUNK"] * tiles["NUM_CHUNKS"] == D


@pytest.mark.parametrize("D", WIDTHS)
def test_a_backward_thread_owns_at_most_24_columns(D):
    tiles = scale_residual_backward._tiles(D)
    values = tiles["ROWS"] * tiles["CHUNK"] * tiles["NUM_CHUNKS"]
    assert values <= 24 * 32 * tiles["num_warps"]
