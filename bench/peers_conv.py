"""Convolutions of DALL-E's encoder with what surrounds them: ours on every back end, and torch's.

"eager" is torch with each of ReLU, bias, addition and pooling on its own, as dall_e writes it, in
its NCHW order; "eager-nhwc" the same, channels last. Bytes are input, output and residual once.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.conv import conv, conv_reference
from kernels import Case, require_close, try_all

# name: side, channels in and out, k, options; one of each kind of each group.
SHAPES = {
    "g1-conv1": (112, 256, 64, 3, {"relu_input": True, "relu": True}),
    "g1-conv2": (112, 64, 64, 3, {"relu": True}),
    "g1-conv4-pool": (112, 64, 256, 1, {"pool": True}),
    "g2-conv2": (56, 128, 128, 3, {"relu": True}),
    "g2-id": (56, 256, 512, 1, {}),
    "g3-conv2": (28, 256, 256, 3, {"relu": True}),
    "g4-conv1": (14, 1024, 512, 3, {"relu_input": True, "relu": True}),
    "g4-conv2": (14, 512, 512, 3, {"relu": True}),
    "g4-conv4": (14, 512, 2048, 1, {}),
}


def cases(device: torch.device, dtype: torch.dtype, only: str) -> Iterator[Case]:
    """Forward in fp16 on CUDA, at batch 256; fp32 on a CPU, at 2. conv4 adds the residual."""
    is_cuda = device.type == "cuda"
    B, dtype = (256, torch.float16) if is_cuda else (2, torch.float32)
    for name, (side, C, D, k, options) in SHAPES.items():
        name = f"B{B}-{name}"
        if only not in name:
            continue
        x = torch.randn(B, side, side, C, device=device).to(dtype)
        weight = (torch.randn(D, k, k, C, device=device) / (k * k * C) ** 0.5).to(dtype)
        bias = torch.randn(D, device=device)
        residual = torch.randn(B, side, side, D, device=device).to(dtype)
        inputs = (x, weight, bias, residual if "conv4" in name else None)
        candidates, failed = try_all(_makers(inputs, options, is_cuda))
        written = B * side * side * D * (2 if "conv4" in name else 1)
        num_bytes = dtype.itemsize * (x.numel() + weight.numel() + written)
        if options.get("pool"):
            num_bytes -= dtype.itemsize * B * side * side * D * 3 // 4
        num_flops = 2 * B * side * side * k * k * C * D
        check = functools.partial(_check, inputs, options)
        yield Case(name, candidates, num_bytes, num_flops, failed=failed, check=check)


def _makers(inputs: tuple, options: dict, is_cuda: bool) -> dict[str, Callable[[], Callable]]:
    def ours(backend: str | None) -> Callable:
        # As the encoder does: what was added to is not needed any more.
        return lambda: conv(*inputs, **options, overwrite=True, backend=backend)

    backends = ("triton", "cudnn") if is_cuda else ("onednn", "torch")
    makers = {"ours": lambda: ours(None)}
    makers |= {backend: functools.partial(ours, backend) for backend in backends}
    planes = [t if t is None or t.ndim < 4 else t.permute(0, 3, 1, 2) for t in inputs]
    contiguous = [None if t is None else t.contiguous() for t in planes]
    makers["eager"] = lambda: lambda: _eager(*contiguous, **options)
    makers["eager-nhwc"] = lambda: lambda: _eager(*planes, **options)
    if is_cuda:
        compiled = torch.compile(_eager, dynamic=False, mode="max-autotune-no-cudagraphs")
        makers["compile-max"] = lambda: lambda: compiled(*planes, **options)
    return makers


def _eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu_input: bool = False,
    relu: bool = False,
    pool: bool = False,
) -> Tensor:
    x = F.relu(x) if relu_input else x
    out = F.conv2d(x, weight, bias.to(x.dtype), padding=weight.shape[-1] // 2)
    out = out if residual is None else residual + out
    out = F.relu(out) if relu else out
    return F.max_pool2d(out, 2) if pool else out


def _check(inputs: tuple, options: dict) -> None:
    """Ours against the reference on one image: no time is printed for wrong numbers."""
    x, weight, bias, residual = inputs
    small = (x[:1], weight, bias, None if residual is None else residual[:1])
    require_close([conv(*small, **options)], [conv_reference(*small, **options)], x.dtype)
