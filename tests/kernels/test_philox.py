"""Counter-based random numbers: the known vectors, and the same words in kernel and reference."""

import pytest
import torch

from beit_fast.kernels._triton import launch, tl, triton
from beit_fast.kernels.philox import draw_rng, random_tile, random_words_reference, threshold_of

# From the authors' Random123, kat_vectors, philox4x32-10: counter, key, result.
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def int64(low: int, high: int) -> int:
    value = low | high << 32
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_the_reference_gives_the_authors_words(counter, key, want):
    rng = torch.tensor([int64(*key), int64(*counter[2:])])
    words = random_words_reference(rng, torch.tensor(counter[0]), torch.tensor(counter[1]))
    assert words.tolist() == [word >> 1 for word in want]


@triton.jit
def _words_kernel(rng_ptr, out_ptr, stream, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    quad = rows * (COLS // 4) + tl.arange(0, COLS // 4)[None, :]
    words = random_tile(rng_ptr, quad, stream, ROWS, COLS)
    tl.store(out_ptr + rows * COLS + tl.arange(0, COLS)[None, :], words)


@pytest.mark.parametrize("rng", [(0, 0), (-1, -1), (2**62 + 12345, 2**40 + 7)], ids=str)
def test_kernel_and_reference_draw_the_same(rng, device):
    rng = torch.tensor(rng, device=device)
    words = torch.full((8, 32), -1, dtype=torch.int32, device=device)
    launch(_words_kernel, (1,), on=words, rng_ptr=rng, out_ptr=words, stream=9, ROWS=8, COLS=32)
    quad = torch.arange(64, device=device).view(8, 8)
    want = random_words_reference(rng, quad, torch.tensor(9, device=device)).flatten(1)
    assert torch.equal(words.long(), want)


def test_words_are_uniform_and_streams_apart(device):
    rng = draw_rng(device)
    words = random_words_reference(rng, torch.arange(50_000)[:, None], torch.arange(2)[None, :])
    kept = (words >= threshold_of(0.3)).double()
    assert abs(kept.mean() - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    first, second = kept[:, 0].flatten(), kept[:, 1].flatten()
    assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1]) < 5 / first.numel() ** 0.5


def test_each_draw_differs_and_a_seed_repeats_it(device):
    torch.manual_seed(3)
    first, second = draw_rng(device), draw_rng(device)
    torch.manual_seed(3)
    assert torch.equal(draw_rng(device), first)
    assert not torch.equal(first, second)
