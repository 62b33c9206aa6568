"""Vectors folded into the weights of the linear layer beside them: the same function, exactly.

    gamma (W u + b)            = W' u + b'   with W' = diag(gamma) W, b' = gamma b
    W (w n + s) + b            = W' n + b'   with W' = W diag(w),     b' = b + W s

By the chain rule dgamma = rowsum(W dW') + b db', dw = colsum(W dW') and ds = W^T db', which
autograd finds by itself: the parameters stay what they are, and optimiser and checkpoints with
them. What disappears is the multiplication of activations and the branch saved for dgamma, B N D
values each; what comes is one pass over the weights, F D values, where autocast has one anyway.

Shapes    W (F, D); b (F,) or None; gamma (F,); w, s (D,) or None: a norm's weight and bias
Types     the weight's. A gamma of 1e-5 (Large) times weights of 0.02 leaves fp16's normal numbers:
          train folded in bf16 or fp32
Legend    F counts the linear layer's outputs here
"""

from torch import Tensor

from beit_fast.kernels.arguments import check_floating, check_product


def fold_layer_scale(
    weight: Tensor, bias: Tensor | None, gamma: Tensor
) -> tuple[Tensor, Tensor | None]:
    """W' and b' that make a linear layer scale its own output by gamma; LayerScale goes.

    Raises ValueError where shapes or dtypes do not fit.
    """
    _check(weight, {"bias": (bias, 0), "gamma": (gamma, 0)})
    return gamma[:, None] * weight, None if bias is None else gamma * bias


def fold_norm_affine(
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """W' and b' that make a linear layer take a LayerNorm's output without its weight and bias.

    Raises ValueError where shapes or dtypes do not fit.
    """
    vectors = {"bias": (bias, 0), "norm_weight": (norm_weight, 1), "norm_bias": (norm_bias, 1)}
    _check(weight, vectors)
    if norm_bias is not None:
        check_product(weight=weight, norm_bias=norm_bias)
    if norm_bias is not None:
        shift = weight @ norm_bias
        bias = shift if bias is None else bias + shift
    return weight if norm_weight is None else weight * norm_weight, bias


def _check(weight: Tensor, vectors: dict[str, tuple[Tensor | None, int]]) -> None:
    """vectors: each with the axis of the weight that it goes along."""
    check_floating(weight=weight)
    if weight.ndim != 2:
        raise ValueError(f"the weight is {tuple(weight.shape)}: pass (F, D)")
    for name, (vector, axis) in vectors.items():
        if vector is None:
            continue
        check_floating(**{name: vector})
        if vector.shape != weight.shape[axis : axis + 1]:
            raise ValueError(
                f"{name} is {tuple(vector.shape)}, the weight {tuple(weight.shape)}: pass "
                f"({weight.shape[axis]},)"
            )
