"""Every public operator with every argument of a dtype or shape it cannot mean: refused by name.

What torch would do instead is to promote integers, or to fail deep inside ("mat1 and mat2").
"""

import functools

import pytest
import torch

from beit_fast.kernels.attention import (
    attention,
    attention_qkvpacked,
    rel_pos_attention,
    rel_pos_attention_qkvpacked,
)
from beit_fast.kernels.attention.rel_pos_bias import rel_pos_bias
from beit_fast.kernels.conv import conv
from beit_fast.kernels.conv.pixels import conv_pixels
from beit_fast.kernels.head.gather_rows import gather_rows
from beit_fast.kernels.head.linear_argmax import linear_argmax
from beit_fast.kernels.head.linear_cross_entropy import masked_linear_cross_entropy
from beit_fast.kernels.input.mask_embed import mask_embed
from beit_fast.kernels.input.patches import normalized_patches
from beit_fast.kernels.input.ragged_views import ragged_views
from beit_fast.kernels.linear import linear
from beit_fast.kernels.residual import layer_norm, scale_residual, scale_residual_norm
from beit_fast.kernels.residual.fold import fold_layer_scale, fold_norm_affine
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table

INTEGERS = (torch.uint8, torch.int32, torch.int64, torch.bool)
FLOATS = (torch.float16, torch.bfloat16, torch.float64)
# Which of another dtype are understood, beside other floats where products are not concerned.
TAKEN = {
    ("attention", "bias", torch.bool), ("attention_qkvpacked", "bias", torch.bool),
    ("conv_pixels", "pixels", torch.uint8),
    ("gather_rows", "index", torch.int32), ("linear_argmax", "index", torch.int32),
    ("masked_linear_cross_entropy", "index", torch.int32),
    ("masked_linear_cross_entropy", "target", torch.int32),
    ("normalized_patches", "index", torch.int32),
}  # fmt: skip


def cases():
    f, index = torch.randn, torch.tensor([1, 2])
    q, k, v = f(3, 2, 5, 2, 8).unbind()
    qkv, bias, table = f(2, 5, 3, 2, 8), f(2, 5, 5), f(12, 2)
    x, branch, vector = f(2, 5, 8), f(2, 5, 8), f(8)
    weight, outputs = f(4, 8), f(4)
    norm = {"norm_weight": vector, "norm_bias": vector}
    pixels = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    half, on_cpu = (0.5,) * 3, functools.partial(torch.tensor, device="cpu")
    return {
        attention: {"q": q, "k": k, "v": v, "bias": bias},
        attention_qkvpacked: {"qkv": qkv, "bias": bias},
        rel_pos_attention: {"q": q, "k": k, "v": v, "table": table, "grid": (2, 2)},
        rel_pos_attention_qkvpacked: {"qkv": qkv, "table": table, "grid": (2, 2)},
        rel_pos_bias: {"table": table, "grid": (2, 2)},
        gather_rows: {"x": x, "index": index},
        linear: {"x": x, "weight": weight, "bias": outputs},
        linear_argmax: {"x": x, "weight": weight, "bias": outputs, "index": index},
        masked_linear_cross_entropy: {
            "x": x, "index": index, "target": index, "weight": weight, "bias": outputs, **norm
        },
        mask_embed: {
            "patches": f(2, 4, 8), "cls_token": vector, "mask_token": vector,
            "mask": f(2, 4) < 0, "pos": f(5, 8),
        },
        normalized_patches: {
            "images": pixels, "patch_pixels": (4, 4), "mean": half, "std": half, "index": index
        },
        ragged_views: {
            "pixels": pixels.flatten(), "offsets": on_cpu([0, 192]), "sizes": on_cpu([[8, 8]] * 2),
            "boxes": on_cpu([[0, 0, 4, 4]] * 2), "flips": on_cpu([True, False]),
            "planar": on_cpu([True, False]), "steps": on_cpu([[1], [2]]),
            "factors": on_cpu([[0.5], [1.5]]), "views": (("bicubic", (2, 2)),),
        },
        scale_residual: {"x": x, "branch": branch, "gamma": vector, "keep": f(2)},
        scale_residual_norm: {"x": x, "branch": branch, "gamma": vector, "keep": f(2), **norm},
        layer_norm: {"x": x, "weight": vector, "bias": vector},
        conv: {"x": f(2, 4, 4, 8), "weight": f(8, 3, 3, 8), "bias": f(8)},
        conv_pixels: {"pixels": pixels, "weight": f(8, 3, 3, 3), "bias": f(8)},
        fold_layer_scale: {"weight": weight, "bias": outputs, "gamma": outputs},
        fold_norm_affine: {"weight": weight, "bias": outputs, **norm},
        resize_rel_pos_table: {"table": table, "src_grid": (2, 2), "dst_grid": (3, 3)},
        resize_pos_embed: {"pos_embed": f(1, 5, 8), "src_grid": (2, 2), "dst_grid": (3, 3)},
    }  # fmt: skip


@pytest.mark.parametrize("function", [f.__name__ for f in cases()])
def test_what_no_argument_can_be_is_a_value_error(function):
    call, arguments = next(item for item in cases().items() if item[0].__name__ == function)
    call(**arguments)  # as they are they do
    tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    for name, tensor in tensors.items():
        for dtype in (*INTEGERS, torch.complex64):
            if dtype != tensor.dtype and (function, name, dtype) not in TAKEN:
                with pytest.raises(ValueError, match=str(dtype)):
                    call(**arguments | {name: tensor.to(dtype)})
        for dtype in FLOATS:  # promoted, or refused by name
            refusal = refusal_of(call, arguments | {name: tensor.to(dtype)})
            assert refusal is None or str(dtype) in refusal
        for other in (tensor[None], tensor[0], torch.cat((tensor, tensor[:1])), tensor[..., 1:]):
            refusal_of(call, arguments | {name: other})


def refusal_of(call, arguments):
    """What ValueError says, or None; another error is the test's failure."""
    try:
        call(**arguments)
    except ValueError as error:
        return str(error)
    return None


def test_a_product_of_two_dtypes_takes_autocast_as_its_error_says():
    x, weight = torch.randn(2, 8, dtype=torch.float16), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"x is torch\.float16, weight is torch\.float32: .*autoc"):
        linear(x, weight)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"x is torch\.float64"):
            linear(x.double(), weight)
    assert linear(x.float(), weight).dtype == torch.float32
