"""The tiles of attention fit GPUs whose CTAs have 99 KiB of shared memory.

That they fit in machine code, and what it takes, `tests/bench/test_machine_code.py` has for some.
"""

from types import SimpleNamespace

import pytest
import torch

from beit_fast.kernels._triton import gpu_of
from beit_fast.kernels.attention.configs import (
    WholeForward,
    dbias_ctas,
    forward_config,
    general_config,
)


@pytest.fixture(params=[(8, 6), (8, 9), (12, 0)], ids=["sm_86", "sm_89", "sm_120"])
def gpu(request, monkeypatch):
    """Read from a device of that capability."""
    properties = SimpleNamespace(
        major=request.param[0],
        minor=request.param[1],
        multi_processor_count=84,
        L2_cache_size=6 << 20,
        shared_memory_per_block_optin=99 << 10,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return gpu_of(SimpleNamespace(device=torch.device("cuda", 0)))


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_tile_of_dbias_fits_whatever_the_width_of_a_head(gpu, dtype, dropout):
    for K in range(16, 129, 16):
        for N in (50, 144, 197, 257, 577):
            tile = general_config(gpu, dtype, N, N, K, dropout).dbias
            # Rows of q, dout and of k, v; a tile of the bias beside them in 16 bits.
            operands = 2 * (tile.block_n + tile.block_m) * K * dtype.itemsize
            beside = tile.block_n * tile.block_m * 2 if dtype == torch.bfloat16 else 0
            assert operands + beside <= 99 << 10
            assert dbias_ctas(gpu, dtype, K, tile, dropout) >= 1


def test_two_ctas_hold_their_keys_and_values_at_once(gpu):
    for K in range(16, 129, 16):
        for M in range(1, 257):
            config = forward_config(gpu, torch.bfloat16, M, M, K, dropout=False)
            if isinstance(config, WholeForward):
                keys = sum(config.first) + sum(config.second)
                assert 2 * (2 * keys * K * 2 + 1024) <= 100 << 10
