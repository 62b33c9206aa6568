"""Random numbers of a step: a function of (seed, step, rank)."""

import hashlib
import struct


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generators for one step; its micro-batches draw one after another."""
    digest = hashlib.blake2b(struct.pack("<3q", seed, step, rank), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
