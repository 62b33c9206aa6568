"""Strides of (B, length, H, K) tensors, by the names of kernel arguments."""

import math

from torch import Tensor

from beit_fast.kernels._triton import tl


def strides_of(name: str, tensor: Tensor | None, length: str) -> dict[str, int]:
    """Strides of a (B, N or M, H, K) tensor by argument name; zeros where there is none."""
    strides = tensor.stride()[:3] if tensor is not None else (0, 0, 0)
    return dict(zip((f"{name}_stride_{dim}" for dim in ("b", length, "h")), strides, strict=True))


def strides_in_units(**tensors: Tensor | None) -> tuple[dict[str, int], int, object]:
    """Strides by argument name in units, the unit in elements, and the type of tile offsets.

    The unit is known to the compiler, so that it sees how rows are aligned: at most 8 elements,
    what one load of 16 bits takes. No tile has more than 128 rows.
    """
    strides = {
        f"{name}_stride_{dim}": tensor.stride(i)
        if tensor is not None and tensor.shape[i] > 1
        else 0
        for name, tensor in tensors.items()
        for i, dim in enumerate("bnh")
    }
    unit = math.gcd(8, *strides.values())
    farthest = 128 * max(stride for name, stride in strides.items() if name.endswith("_n"))
    offset = tl.int32 if farthest < 2**31 else tl.int64
    return {name: stride // unit for name, stride in strides.items()}, unit, offset
