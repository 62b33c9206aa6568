"""Operators without second derivatives say so, instead of taking gradients for constants.

A backward that is an operator itself gives gradients that autograd cannot look into: what is
computed from them (a gradient penalty, a Hessian) would miss their share, in silence.
torch's `once_differentiable` refuses only where the incoming gradient is differentiable, and a loss
is often a plain sum.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class _Refusal(torch.autograd.Function):
    """The gradients, as functions of `anchors`: the way to whatever they depend on."""

    @staticmethod
    def forward(ctx, message: str, num_gradients: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(gradient.view_as(gradient) for gradient in tensors[:num_gradients])

    @staticmethod
    def backward(ctx, *_: Tensor):
        raise RuntimeError(ctx.message)


def first_order(operator: str, way_out: str) -> Callable:
    """Make the backward of `torch.library.register_autograd` refuse to be differentiated.

    It has to save, or be handed, each input that its gradients depend on. Backward without
    `create_graph=True` runs as it did. What is raised is a RuntimeError that ends with `way_out`.
    """
    message = f"{operator} has first derivatives alone, and a second one is asked for: {way_out}"

    def decorate(differentiate: Callable) -> Callable:
        @functools.wraps(differentiate)
        def checked(ctx, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return differentiate(ctx, *douts)
            with torch.no_grad():
                results = differentiate(ctx, *douts)
            tensors = (*douts, *ctx.saved_tensors)
            anchors = [t for t in tensors if t is not None and t.requires_grad]
            places = [place for place, result in enumerate(results) if result is not None]
            if not anchors or not places:
                return results
            gradients = [results[place].detach() for place in places]
            refusing = _Refusal.apply(message, len(gradients), *gradients, *anchors)
            results = list(results)
            for place, gradient in zip(places, refusing, strict=True):
                results[place] = gradient
            return tuple(results)

        return checked

    return decorate
