"""Memory of a process that does one thing alone."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


def in_own_process(function: Callable[..., float], *arguments: object, threads: int) -> float:
    """`function(*arguments)` in a new process with as many of torch's threads: neither the
    high-water mark of a process nor the pool of a CUDA graph falls again."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *arguments).result()


def resident_kib(field: str) -> int:
    """What the kernel says of this process: VmRSS now, VmHWM at most. (`ru_maxrss` starts at what
    the parent held when it forked.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: CPU memory is measured on Linux only")
