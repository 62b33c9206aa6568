"""The yardstick for kernels: no worse than what the reference itself loses in the same dtype."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _run(function: Callable, tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Output and the gradients of all floating inputs, computed from inputs in `dtype`."""
    inputs = [
        t.detach().to(dtype).requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    out = function(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    generator = torch.Generator(out.device).manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64, device=out.device)
    out.backward(dout.to(dtype).to(out.dtype))
    return [out, *(t.grad for t in inputs if t is not None and t.is_floating_point())]


@pytest.fixture
def assert_as_exact_as_reference():
    """Check forward and every gradient: error against fp64 <= 2 x the reference's + one rounding.

    The fp64 run starts from inputs already rounded to the dtype under test.
    """

    def check(function, reference, tensors, dtype) -> None:
        rounded = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
        exact = _run(reference, rounded, torch.float64)
        theirs, ours = _run(reference, rounded, dtype), _run(function, rounded, dtype)
        for number, (want, their, our) in enumerate(zip(exact, theirs, ours, strict=True)):
            assert our.shape == want.shape
            assert our.dtype == their.dtype
            rounding = torch.finfo(dtype).eps * want.abs().amax() if want.numel() else 0.0
            allowed = 2 * (their - want).abs().amax() + rounding if want.numel() else 0.0
            error = (our - want).abs().amax() if want.numel() else 0.0
            assert error <= allowed, f"result {number}: error {error:.2e}, allowed {allowed:.2e}"

    return check


@pytest.fixture(autouse=True)
def _tensors_are_made_where_kernels_run(device):
    """A test that is about a CPU says so where it makes its tensors."""
    with device:
        yield


@pytest.fixture
def new_memory_is_nan():
    """An element that nobody writes shows: in this mode torch fills `empty`."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
