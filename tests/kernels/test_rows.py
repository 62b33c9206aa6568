"""Chunks of rows: which width is chosen."""

import pytest

from beit_fast.kernels._triton import cdiv
from beit_fast.kernels.rows import best_chunk


@pytest.mark.parametrize("most", [1, 3, 6])
@pytest.mark.parametrize("D", [1, 16, 37, 192, 768, 1280, 1408, 2048])
def test_no_other_chunk_leaves_less_beyond_a_row(D, most):
    chunks = [16 << i for i in range(8)]  # to 2048
    possible = [chunk for chunk in chunks if cdiv(D, chunk) <= most]
    beyond = {chunk: cdiv(D, chunk) * chunk - D for chunk in possible}
    chosen = best_chunk(D, widest=2048, most=most)
    assert beyond[chosen] == min(beyond.values())
    assert chosen == max(chunk for chunk in possible if beyond[chunk] == beyond[chosen])


def test_a_row_wider_than_all_chunks_gets_the_widest():
    assert best_chunk(8192, widest=256, most=3) == 256
