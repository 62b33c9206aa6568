"""Files that are damaged in one place after the other, as a disk or a copy does it."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def flipped(path: Path, place: int, bit: int) -> Iterator[None]:
    """The file with that bit of the byte at `place` flipped."""
    file = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(file, 1, place)
        os.pwrite(file, bytes([byte ^ 1 << bit]), place)
        yield
        os.pwrite(file, bytes([byte]), place)
    finally:
        os.close(file)


def damages(path: Path, *, flips: int, zeroed: int = 0, seed: int = 0) -> Iterator[str]:
    """The file with one bit flipped, `flips` times, or a range of it zeroed; whole in the end.

    What was done, which lies in the file while the caller looks. Bits are of the first bytes, of
    the header where it is one of safetensors, of the tail, and of any place in turn.
    """
    content, rng = path.read_bytes(), random.Random(seed)
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 64
    size = len(content)
    regions = ((0, 8), (8, min(header, size)), (max(0, size - 64), size), (0, size))
    try:
        for number in range(flips):
            place, bit = rng.randrange(*regions[number % 4]), rng.randrange(8)
            with flipped(path, place, bit):
                yield f"bit {bit} of byte {place} of {path.name}"
        for _ in range(zeroed):
            place, length = rng.randrange(size), rng.randrange(1, 512)
            damaged = bytearray(content)
            damaged[place : place + length] = bytes(len(damaged[place : place + length]))
            if damaged != content:
                path.write_bytes(damaged)
                yield f"zeros from byte {place} of {path.name}, {length} of them"
    finally:
        path.write_bytes(content)


def not_refused(
    path: Path, damages: Iterator[str], load: Callable[[Path], object], named: str | None = None
) -> list[str]:
    """What of `damages` was not refused by a ValueError that names the file, or `named`."""
    missed, tried = [], 0
    for what in damages:
        tried += 1
        try:
            load(path)
        except ValueError as error:
            if (named or path.name) in str(error):
                continue
            what = f"{what}: {error}"
        missed.append(what)
    assert tried
    return missed
