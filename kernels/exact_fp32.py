"""fp32 that is fp32: convolutions and products of CUDA's libraries without TF32, for a while.

cuDNN convolves fp32 in TF32 unless it is told not to, with 10 of 23 bits of each factor; products
do so where the user allows it. What promises fp32 holds on to `exact_fp32` around its calls.

Both of torch's interfaces may have been used before, and a mixture is an error of torch's: what is
changed is changed, and put back, by the interface that holds it, and what is exact stays as it is.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_holders = 0
_put_back: list[Callable[[], object]] = []


@contextmanager
def exact_fp32() -> Iterator[None]:
    """No TF32 in the block, in any thread; calls may nest and overlap.

    For eager code: torch.compile does not trace it, operators of torch.library may use it.

    >>> with exact_fp32():
    ...     ids = dvae.encoder(images).argmax(dim=1)
    """
    global _holders
    with _lock:
        if _holders == 0:
            _put_back.extend(_turn_off())
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            while _holders == 0 and _put_back:
                _put_back.pop()()


def _turn_off() -> Iterator[Callable[[], object]]:
    """Makes convolutions and products exact; what undoes it."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if cudnn.conv.fp32_precision == "tf32":
        if _answers(lambda: cudnn.allow_tf32):
            cudnn.allow_tf32 = False
            yield lambda: setattr(cudnn, "allow_tf32", True)
        # Set by the newer interface, or what all of torch is told still reaches convolutions.
        if cudnn.conv.fp32_precision == "tf32":
            cudnn.conv.fp32_precision = "ieee"
            yield lambda: setattr(cudnn.conv, "fp32_precision", "tf32")
    if matmul.fp32_precision == "tf32":
        allowed = _answers(torch.get_float32_matmul_precision)
        if allowed is None:  # set by the newer interface
            matmul.fp32_precision = "ieee"
            yield lambda: _restore(matmul, "tf32")
        else:
            of_cpu = torch.backends.mkldnn.matmul  # the older switch sets it too
            yield functools.partial(_restore, of_cpu, of_cpu.fp32_precision)
            torch.set_float32_matmul_precision("highest")
            yield lambda: torch.set_float32_matmul_precision(allowed)


def _answers(ask: Callable[[], object]) -> object:
    """What torch's older interface says, or None where the newer one was used beside it."""
    try:
        return ask()
    except RuntimeError:
        return None


def _restore(operation: Any, precision: str) -> None:
    """What was inherited is inherited again: it follows what sets all of torch."""
    operation.fp32_precision = "none"
    if operation.fp32_precision != precision:
        operation.fp32_precision = precision
