"""Which number of chunks is chosen, for the shapes the choice is made for."""

import pytest
import torch

from beit_fast.kernels._triton import H100, pretend, record
from beit_fast.kernels.attention.backward import attention_backward
from beit_fast.kernels.attention.chunks import num_chunks


@pytest.mark.parametrize(
    ("programs", "images", "chunk_bytes", "slots", "chunks"),
    [
        # 48 programs a chunk; 5 chunks are 240 programs, two on each of 132 multiprocessors.
        pytest.param(48, 256, 12 * 197 * 208 * 4, 264, 5, id="base-at-224"),
        pytest.param(24, 256, 12 * 128 * 128 * 4, 264, 11, id="N128"),
        pytest.param(12, 4096, 12 * 64 * 64 * 4, 396, 33, id="swin"),
        pytest.param(24, 3, 1, 132, 3, id="an-image-each"),
        pytest.param(1000, 256, 1 << 30, 132, 1, id="partial-sums-too-large-for-two"),
    ],
)
def test_chunks_fill_the_slots(programs, images, chunk_bytes, slots, chunks):
    assert num_chunks(programs, images, chunk_bytes, slots) == chunks


def test_the_general_backward_counts_the_ctas_that_fit():
    # 50 programs a chunk, of 225 registers and 256 threads: one on each of 132 multiprocessors.
    # Two chunks run at once; four, which two on each would hold, would run in two rounds.
    with torch.device("meta"):
        q, k, v, out, dout, dq, dk, dv = torch.empty(8, 64, 577, 2, 64, dtype=torch.bfloat16)
        bias = torch.empty(1, 2, 640, 640, dtype=torch.float16)
        lse = torch.empty(64, 2, 577)
    with pretend(H100), record() as launches:
        partials = attention_backward(
            dout, q, k, v, bias, out, lse, scale=0.125, dropout_p=0.0, rng=None, tf32=False,
            dq=dq, dk=dk, dv=dv, trains_bias=True,
        )  # fmt: skip
    assert launches[-1].arguments["C"] == len(partials) == 2
