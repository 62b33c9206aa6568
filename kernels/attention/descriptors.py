"""Tensor descriptors, by which Hopper's copy engine reads blocks of rows of one image and head."""

from torch import Tensor

from beit_fast.kernels._triton import TensorDescriptor


def can_describe(tensor: Tensor) -> bool:
    """Rows contiguous; base and strides multiples of 16 bytes, strides positive, below 2^40."""
    size = tensor.element_size()
    strides = [
        stride * size
        for stride, length in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
        if length > 1
    ]
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(0 < stride < 1 << 40 and stride % 16 == 0 for stride in strides)
    )


def describe(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of (rows, K) of one image and head; what lies beyond the sequence reads as zero."""
    B, N, H, K = tensor.shape
    # A dimension of one element may carry any stride, and a descriptor only a valid one.
    strides = [
        stride if length > 1 else K
        for stride, length in zip(tensor.stride()[:-1], (B, N, H), strict=True)
    ]
    strides = [strides[0], strides[2], strides[1], 1]
    return TensorDescriptor(tensor, [B, H, N, K], strides, [1, 1, rows, K])
