"""The backward of attention: which of its kernels run.

window    N, M <= 64: one kernel, five products
hopper    N, M <= 208 on sm_90: dbias stays in registers while a program walks over the images
general   all else: any length, width, dtype and architecture, and dropout
"""

from typing import Literal

from torch import Tensor

from beit_fast.kernels._triton import gpu_of
from beit_fast.kernels.attention.backward_general import general_backward
from beit_fast.kernels.attention.backward_hopper import hopper_backward, hopper_fits
from beit_fast.kernels.attention.backward_window import window_backward, window_fits
from beit_fast.kernels.attention.configs import GeneralBackward, general_config

Kernels = Literal["window", "hopper", "general"]


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
    *,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    tf32: bool,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    trains_bias: bool,
    config: GeneralBackward | None = None,
) -> Tensor | None:
    """Write dq, dk, dv where they are tensors; return partial sums of dbias, or None if frozen.

    q, out, dout, dq (B, N, H, K); k, v, dk, dv (B, M, H, K), rows contiguous; padded bias
    (G, H, Rn, Rm); lse (B, H, N) of the forward; dlse (B, H, N), contiguous, the gradient of its
    natural logarithm, or None; partial sums (C, G, H, >= N, >= M) fp32.
    `config` is for tests and tuning: the general kernels, with these tiles.
    """
    chosen = choose_kernels(dout, q, k, v, out, dropout_p) if config is None else "general"
    tensors = (dout, q, k, v, bias, out, lse, dlse)
    wanted = {"scale": scale, "dq": dq, "dk": dk, "dv": dv, "trains_bias": trains_bias}
    if chosen == "window":
        return window_backward(*tensors, **wanted)
    if chosen == "hopper":
        return hopper_backward(*tensors, **wanted)
    if config is None:
        _, N, _, K = q.shape
        config = general_config(gpu_of(q), q.dtype, N, k.shape[1], K, dropout_p > 0, tf32)
    options = {"dropout_p": dropout_p, "rng": rng, "tf32": tf32, "config": config}
    return general_backward(*tensors, **wanted, **options)


def choose_kernels(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dropout_p: float
) -> Kernels:
    """The quickest that can take these: the special ones know no dropout, and say what they fit."""
    if dropout_p > 0:
        return "general"
    if window_fits(q, k, v, out, dout):
        return "window"
    return "hopper" if hopper_fits(q, k, v, out, dout) else "general"
