"""Each operator against its reference at BEiT-B's shapes, by pytest-benchmark.

    pytest bench/test_kernels.py --benchmark-group-by=group

Forward and, for what has a gradient, backward; on the GPU where there is one (bf16; fp16 of what
is not trained), else on the CPU (fp32). What differs from the reference is not timed.
"""

import functools

import pytest
import torch

from beit_fast.kernels.attention import attention_qkvpacked, attention_reference
from beit_fast.kernels.attention.rel_pos_bias import rel_pos_bias, rel_pos_bias_reference
from beit_fast.kernels.conv import conv, conv_reference
from beit_fast.kernels.conv.pixels import conv_pixels, conv_pixels_reference
from beit_fast.kernels.head.linear_argmax import linear_argmax, linear_argmax_reference
from beit_fast.kernels.head.linear_cross_entropy import (
    masked_linear_cross_entropy,
    masked_linear_cross_entropy_reference,
)
from beit_fast.kernels.input.mask_embed import mask_embed, mask_embed_reference
from beit_fast.kernels.input.patches import normalized_patches, normalized_patches_reference
from beit_fast.kernels.linear import linear, linear_reference
from beit_fast.kernels.residual import (
    layer_norm,
    layer_norm_reference,
    scale_residual,
    scale_residual_norm,
    scale_residual_norm_reference,
    scale_residual_reference,
)
from beit_fast.kernels.residual.drop_path import draw_kept_samples

CUDA = torch.cuda.is_available()
DEVICE, DTYPE, B = ("cuda", torch.bfloat16, 128) if CUDA else ("cpu", torch.float32, 4)
N, H, K, V, MASKED = 197, 12, 64, 8192, 75
D = H * K


def tensor(*shape, dtype=DTYPE):
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()


def attention_reference_qkvpacked(qkv, bias):
    return attention_reference(*qkv.unbind(2), bias)


def drop_path(x, branch, gamma, *, function):
    """A branch of three samples in four."""
    return function(x, branch[: len(KEPT.samples)], gamma, kept=KEPT)


KEPT = draw_kept_samples(B, 0.25, torch.device(DEVICE))
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
    "scale_residual_norm": (
        {"ours": scale_residual_norm, "reference": scale_residual_norm_reference},
        lambda: (
            *(tensor(B, N, D), tensor(B, N, D), tensor(D), tensor(D), tensor(D)),
            torch.ones(B, device=DEVICE),
        ),
    ),
    "layer_norm": (
        {"ours": layer_norm, "reference": layer_norm_reference},
        lambda: (tensor(B, N, D), tensor(D), tensor(D)),
    ),
    "drop_path": (
        {
            "ours": functools.partial(drop_path, function=scale_residual),
            "reference": functools.partial(drop_path, function=scale_residual_reference),
        },
        lambda: (tensor(B, N, D), tensor(B, N, D), tensor(D)),
    ),
    "linear_argmax": (
        {"ours": linear_argmax, "reference": linear_argmax_reference},
        lambda: (tensor(B, MASKED, 2048), tensor(V, 2048), tensor(V)),
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
    "normalized_patches": (
        {"ours": normalized_patches, "reference": normalized_patches_reference},
        lambda: (
            torch.randint(256, (B, 224, 224, 3), device=DEVICE, dtype=torch.uint8),
            (16, 16),
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
        ),
    ),
    "mask_embed": (
        {"ours": mask_embed, "reference": mask_embed_reference},
        lambda: (
            tensor(B, N - 1, D),
            tensor(D),
            tensor(D),
            torch.rand(B, N - 1, device=DEVICE) < MASKED / (N - 1),
            tensor(N, D),
        ),
    ),
}


def check_agreement(ours, reference):
    both = (out if isinstance(out, tuple) else (out,) for out in (ours, reference))
    for our, want in zip(*both, strict=True):
        if our.is_floating_point():
            error = (our.double() - want.double()).norm() / want.double().norm()
            assert error <= max(2 * torch.finfo(our.dtype).eps, 1e-5)
        elif our.ndim:  # the best of thousands of scores: close ones may change places
            assert (our == want).double().mean() >= 0.999


HALF = torch.float16 if CUDA else torch.float32
# DALL-E's encoder: its first convolution, and the first of its last group.
CASES |= {
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
@pytest.mark.parametrize("kernel", CASES)
def test_forward_and_backward(benchmark, kernel, who):
    candidates, make_inputs = CASES[kernel]
    inputs = make_inputs()
    benchmark.group = kernel

    def step():
        out = candidates[who](*inputs)
        outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        if CUDA:
            torch.cuda.synchronize()
        return out

    check_agreement(*(candidates[name](*inputs) for name in ("ours", "reference")))
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
