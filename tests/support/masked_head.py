"""A small head of masked image modelling, for the test files of its loss."""

import pytest
import torch

B, N, D, V = 3, 10, 16, 50
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def head(V=V, D=D):
    """weight, bias, norm_weight, norm_bias."""
    return torch.randn(V, D) / D**0.5, torch.randn(V), torch.randn(D), torch.randn(D)
