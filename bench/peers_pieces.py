"""The small operators: what they replace, and torch.compile of that.

linear          torch's own, which multiplies by another library on a CPU
rel_pos_bias    a look-up of every pair, as everybody writes it
layer_norm      torch's own
scale_residual  the residual without a norm after it, at the end of the encoder
drop_path       a branch of nine samples in ten, computed for those alone and added where they
                belong; the peers add it with an index, or ("factor") compute and add all of it

Bytes are those of activations, table and bias read and written once.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.attention.rel_pos_bias import (
    rel_pos_bias,
    rel_pos_bias_reference,
    relative_position_rows,
)
from beit_fast.kernels.linear import linear, linear_reference
from beit_fast.kernels.residual import layer_norm, scale_residual
from beit_fast.kernels.residual.drop_path import KeptSamples, draw_kept_samples
from kernels import Case, require_as_exact, run_of, try_all

EPS, GRID, N = 1e-6, (14, 14), 197
DROP_PATH = 0.1
PASSES = ("forward", "both")


@dataclass(frozen=True)
class Piece:
    """An operator at one shape: the same inputs for all; those that require a gradient get one."""

    inputs: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    num_bytes: float  # of the forward; the backward reads and writes as much again
    num_flops: float = 0.0
    others: tuple[tuple[str, Callable[..., Tensor]], ...] = ()


def cases(device: torch.device, dtype: torch.dtype, only: str) -> Iterator[Case]:
    """Forward, and forward with backward, of each piece."""
    is_cuda = device.type == "cuda"
    shapes = ((256, 768), (256, 1024)) if is_cuda else ((4, 768),)
    for B, D in shapes:
        for name, make in PIECES.items():
            parts = [part for part in PASSES if only in f"{name}-B{B}-D{D}-{part}"]
            if not parts:
                continue
            piece = make(B, D, device, dtype)
            peers = {"ours": piece.ours, "eager": piece.eager, **dict(piece.others)}
            if is_cuda:
                peers["compile"] = torch.compile(piece.eager, dynamic=False)
            check = functools.partial(_check, piece)
            for part in parts:
                runs = {peer: _bind(part, run, piece.inputs) for peer, run in peers.items()}
                candidates, failed = try_all(runs)
                passes = 1 if part == "forward" else 2
                num_flops = piece.num_flops * (1 if part == "forward" else 3)
                yield Case(
                    f"{name}-B{B}-D{D}-{part}",
                    candidates,
                    passes * piece.num_bytes,
                    num_flops,
                    failed=failed,
                    check=check,
                )


def _linear(B: int, D: int, device: torch.device, dtype: torch.dtype) -> Piece:
    x, weight, bias = _trained(dtype, device, (B, N, D), (4 * D, D), (4 * D,))
    num_bytes = x.nbytes + weight.nbytes + 4 * x.nbytes
    return Piece((x, weight, bias), linear, linear_reference, num_bytes, 8 * x.numel() * D)


def _rel_pos_bias(B: int, D: int, device: torch.device, dtype: torch.dtype) -> Piece:
    del B, dtype  # the table is a parameter, fp32
    H = D // 64
    (table,) = _trained(torch.float32, device, (relative_position_rows(GRID), H))
    ours, eager = (functools.partial(f, grid=GRID) for f in (rel_pos_bias, rel_pos_bias_reference))
    return Piece((table,), ours, eager, table.nbytes + 4 * H * N * N)


def _layer_norm(B: int, D: int, device: torch.device, dtype: torch.dtype) -> Piece:
    x, weight, bias = _trained(dtype, device, (B, N, D), (D,), (D,))

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[2:], weight, bias, EPS)

    return Piece((x, weight, bias), functools.partial(layer_norm, eps=EPS), eager, 2 * x.nbytes)


def _scale_residual(B: int, D: int, device: torch.device, dtype: torch.dtype) -> Piece:
    x, branch, gamma = _trained(dtype, device, (B, N, D), (B, N, D), (D,))
    keep = (torch.rand(B, device=device) >= DROP_PATH) / (1 - DROP_PATH)

    def eager(x: Tensor, branch: Tensor, gamma: Tensor, keep: Tensor) -> Tensor:
        return x + keep.to(x.dtype)[:, None, None] * (gamma * branch)

    return Piece((x, branch, gamma, keep), scale_residual, eager, 3 * x.nbytes)


def _drop_path(B: int, D: int, device: torch.device, dtype: torch.dtype) -> Piece:
    """The branch is a product, so that what is not computed shows."""
    kept = draw_kept_samples(B, DROP_PATH, device)
    keep = torch.where(kept.slots >= 0, kept.scale, 0.0)
    x, weight, gamma = _trained(dtype, device, (B, N, D), (D, D), (D,))
    with torch.no_grad():
        weight /= D**0.5

    def ours(x: Tensor, weight: Tensor, gamma: Tensor) -> Tensor:
        branch = F.linear(x.index_select(0, kept.samples), weight)
        return scale_residual(x, branch, gamma, kept=kept)

    def eager(x: Tensor, weight: Tensor, gamma: Tensor) -> Tensor:
        branch = F.linear(x.index_select(0, kept.samples), weight)
        return x.index_add(0, kept.samples, gamma * branch, alpha=kept.scale)

    def factor(x: Tensor, weight: Tensor, gamma: Tensor) -> Tensor:
        return x + keep.to(x.dtype)[:, None, None] * (gamma * F.linear(x, weight))

    num_bytes, num_flops = _drop_path_counts(x, kept)
    others = (("factor", factor),)
    return Piece((x, weight, gamma), ours, eager, num_bytes, num_flops, others)


def _drop_path_counts(x: Tensor, kept: KeptSamples) -> tuple[float, float]:
    """x twice in and once out, the branch written and read; its product."""
    share = len(kept.samples) / len(x)
    return x.nbytes * (2 + 3 * share), 2 * share * x.numel() * x.shape[2]


PIECES: dict[str, Callable[[int, int, torch.device, torch.dtype], Piece]] = {
    "linear": _linear,
    "rel_pos_bias": _rel_pos_bias,
    "layer_norm": _layer_norm,
    "scale_residual": _scale_residual,
    "drop_path": _drop_path,
}


def _trained(dtype: torch.dtype, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def _bind(part: str, function: Callable, inputs: tuple[Tensor, ...]) -> Callable:
    """A maker for `try_all`: what it returns is timed."""
    leaves = [t for t in inputs if t.requires_grad]

    def make() -> Callable[[], object]:
        dout = torch.randn_like(function(*inputs))
        return run_of(part, lambda: function(*inputs), leaves, dout)

    return make


def _check(piece: Piece) -> None:
    """Output and gradients against the eager ones, both held against fp64."""
    exact_inputs = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in piece.inputs)
    dout = torch.randn_like(piece.eager(*piece.inputs))

    def run(function: Callable, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        out = function(*inputs)
        leaves = [t for t in inputs if t.requires_grad]
        return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    exact = run(piece.eager, exact_inputs)
    require_as_exact(run(piece.ours, piece.inputs), run(piece.eager, piece.inputs), exact)
