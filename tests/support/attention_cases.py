"""What several test files of attention share."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.kernels.attention import attention_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OURS = pytest.mark.parametrize("backend", ["cpu", "triton"])


def packed_reference(qkv, bias=None, **options):
    return attention_reference(*qkv.unbind(2), bias, **options)


class CountCalls(TorchDispatchMode):
    """How often an operator runs."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.calls = operator, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is self.operator
        return function(*args, **kwargs or {})


def gradients(function, *leaves):
    """Output, and gradients of a loss that is not linear in it."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out, *torch.autograd.grad(out.square().sum(), leaves)
