"""fp32 that is fp32: convolutions and products of CUDA's libraries without TF32, for a while.

cuDNN convolves fp32 in TF32 unless it is told not to, with 10 of 23 bits of each factor; products
do so where the user allows it. What promises fp32 holds on to `exact_fp32` around its calls.

Both of torch's interfaces may have been used before, and a mixture is an error of torch's: what is
changed is changed, and put back, by the interface that holds it, and what is exact stays as it is.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    if conv.fp32_precision == "tf32":
        conv.fp32_precision = "ieee"
        yield lambda: setattr(conv, "fp32_precision", "tf32")
    if matmul.fp32_precision == "tf32":
        try:
            allowed = torch.get_float32_matmul_precision()
        except RuntimeError:  # set by the newer interface
            matmul.fp32_precision = "ieee"
            yield lambda: setattr(matmul, "fp32_precision", "tf32")
        else:
            torch.set_float32_matmul_precision("highest")
            yield lambda: torch.set_float32_matmul_precision(allowed)
