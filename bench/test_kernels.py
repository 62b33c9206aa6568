"""Each operator against its reference at BEiT-B's shapes, by pytest-benchmark.

    pytest bench/test_kernels.py --benchmark-group-by=group

Forward and backward, on the GPU where there is one (bf16), else on the CPU (fp32); forward alone,
in fp16 on the GPU, of what is not trained.
"""

import pytest
import torch

from beit_fast.kernels.attention import attention_qkvpacked, attention_reference
from beit_fast.kernels.conv import conv, conv_reference
from beit_fast.kernels.conv_pixels import conv_pixels, conv_pixels_reference
from beit_fast.kernels.linear import linear, linear_reference
from beit_fast.kernels.linear_cross_entropy import (
    masked_linear_cross_entropy,
    masked_linear_cross_entropy_reference,
)
from beit_fast.kernels.rel_pos_bias import rel_pos_bias, rel_pos_bias_reference
from beit_fast.kernels.scale_residual import scale_residual, scale_residual_reference

CUDA = torch.cuda.is_available()
DEVICE, DTYPE, B = ("cuda", torch.bfloat16, 128) if CUDA else ("cpu", torch.float32, 4)
N, H, K, V, MASKED = 197, 12, 64, 8192, 75
D = H * K


def tensor(*shape, dtype=DTYPE):
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()


def attention_reference_qkvpacked(qkv, bias):
    return attention_reference(*qkv.unbind(2), bias)


CASES = {
    "attention": (
        {"ours": attention_qkvpacked, "reference": attention_reference_qkvpacked},
        lambda: (tensor(B, N, 3, H, K), tensor(H, N, N)),
    ),
    "linear": (
        {"ours": linear, "reference": linear_reference},
        lambda: (tensor(B, N, D), tensor(4 * D, D), tensor(4 * D)),
    ),
    "scale_residual": (
        {"ours": scale_residual, "reference": scale_residual_reference},
        lambda: (tensor(B, N, D), tensor(B, N, D), tensor(D), torch.ones(B, device=DEVICE)),
    ),
    "rel_pos_bias": (
        {"ours": rel_pos_bias, "reference": rel_pos_bias_reference},
        lambda: (tensor(732, H, dtype=torch.float32), (14, 14)),
    ),
    "masked_linear_cross_entropy": (
        {"ours": masked_linear_cross_entropy, "reference": masked_linear_cross_entropy_reference},
        lambda: (
            tensor(B, N, D),
            torch.randperm(B * N, device=DEVICE)[: B * MASKED].int(),
            torch.randint(V, (B * MASKED,), device=DEVICE),
            tensor(V, D),
            tensor(V),
            tensor(D),
            tensor(D),
        ),
    ),
}


@pytest.mark.parametrize("who", ["ours", "reference"])
@pytest.mark.parametrize("kernel", CASES)
def test_forward_and_backward(benchmark, kernel, who):
    candidates, make_inputs = CASES[kernel]
    inputs = make_inputs()
    benchmark.group = kernel

    def step():
        out = candidates[who](*inputs)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.ones_like(out))
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=7, warmup_rounds=2)


HALF = torch.float16 if CUDA else torch.float32
# DALL-E's encoder: its first convolution, and the first of its last group.
FORWARD_CASES = {
    "conv_pixels": (
        {"ours": conv_pixels, "reference": conv_pixels_reference},
        lambda: (
            torch.randint(0, 256, (B, 112, 112, 3), dtype=torch.uint8, device=DEVICE),
            tensor(256, 7, 7, 3, dtype=HALF).detach(),
            tensor(256, dtype=torch.float32).detach(),
        ),
    ),
    "conv": (
        {"ours": conv, "reference": conv_reference},
        lambda: (
            tensor(B, 14, 14, 1024, dtype=HALF).detach(),
            tensor(512, 3, 3, 1024, dtype=HALF).detach(),
            tensor(512, dtype=torch.float32).detach(),
        ),
    ),
}


@pytest.mark.parametrize("who", ["ours", "reference"])
@pytest.mark.parametrize("kernel", FORWARD_CASES)
def test_forward(benchmark, kernel, who):
    candidates, make_inputs = FORWARD_CASES[kernel]
    inputs = make_inputs()
    benchmark.group = kernel

    def step():
        candidates[who](*inputs)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
