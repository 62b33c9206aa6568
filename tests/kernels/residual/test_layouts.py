"""Rows wherever they lie, however many: strides, shares, empty batches, unused outputs."""

import pytest
import torch

from beit_fast.kernels._triton import Gpu, pretend
from beit_fast.kernels.residual import (
    scale_residual,
    scale_residual_norm,
    scale_residual_norm_reference,
)
from residual_cases import BACKENDS, VECTORS, assert_same_to_rounding, rng_on, run

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")


@pytest.mark.parametrize("num_sms", [1, 3])
def test_shares_of_few_programs_add_up_and_the_bits_repeat(num_sms, device):
    B, N, D = 2, 33, 64
    tensors = {"x": torch.randn(B, N, D), "branch": torch.randn(B, N, D)}
    tensors |= {name: torch.randn(D) for name in VECTORS}
    douts = torch.randn(2, B, N, D)
    with pretend(Gpu((9, 0), num_sms, 1 << 20)):
        first, second = (
            run(scale_residual_norm, tensors, douts, device, backend="triton") for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    theirs = run(scale_residual_norm_reference, tensors, douts, device)
    assert_same_to_rounding(first, theirs, roundings=16)


def test_rows_may_lie_apart_and_columns_too(device):
    wide = torch.randn(6, 2, 5, 40, device=device)
    x, branch, dout = wide[0][:, 1:, :32], wide[1].transpose(0, 1)[1:, :, 4:36].transpose(0, 1), 0
    assert not x.is_contiguous()
    columns_apart = torch.randn(2, 32, 4, device=device).transpose(1, 2)
    dout = torch.ones((), device=device).expand(2, 4, 32)
    for dln in (columns_apart, wide[2][:, 1:, :32]):
        tensors = {"x": x, "branch": branch, "gamma": torch.randn(32)}
        ours = run(scale_residual_norm, tensors, [dout, dln], device, backend="triton")
        theirs = run(scale_residual_norm_reference, tensors, [dout, dln], device)
        assert_same_to_rounding(ours, theirs)
    ours = scale_residual(columns_apart, columns_apart, backend="triton")
    torch.testing.assert_close(ours, 2 * columns_apart)


def test_strides_may_pass_two_to_the_31(device, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    # The memory between the two samples is never touched, so a CPU never provides it.
    storage = torch.empty(2**31 + 256, dtype=torch.float16, device=device)
    far = storage.as_strided((2, 1, 64), (2**31 + 64, 64, 1))
    near = torch.randn(2, 1, 64, device=device).half()
    far.copy_(near)
    out, ln = scale_residual_norm(far, far, backend="triton")
    expected = scale_residual_norm(near, near, backend="triton")
    assert torch.equal(out, expected[0])
    assert torch.equal(ln, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32), (1, 1, 32)], ids=str)
def test_an_empty_batch_and_a_single_row_are_inputs(shape, backend, device):
    tensors = {"x": torch.randn(shape), "branch": torch.randn(shape)}
    tensors |= {name: torch.randn(32) for name in VECTORS}
    douts = torch.randn(2, *shape)
    options = {"drop_path_p": 0.2, "rng": rng_on(device)}
    ours = run(scale_residual_norm, tensors, douts, device, **options, backend=backend)
    theirs = run(scale_residual_norm_reference, tensors, douts, device, **options)
    assert_same_to_rounding(ours, theirs)
    if not shape[0] * shape[1]:
        assert all(not gradient.any() for gradient in ours[2:])


@pytest.mark.parametrize("unused", ["out", "ln"])
def test_an_output_that_nobody_uses_has_no_gradient_to_add(unused, device):
    tensors = {"x": torch.randn(2, 3, 32), "branch": torch.randn(2, 3, 32)}
    tensors |= {name: torch.randn(32) for name in VECTORS}
    results = []
    for function, options in (
        (scale_residual_norm, {"backend": "triton"}),
        (scale_residual_norm_reference, {}),
    ):
        leaves = {name: t.to(device).requires_grad_() for name, t in tensors.items()}
        out, ln = function(**leaves, **options)
        (ln if unused == "out" else out).square().sum().backward()
        results.append([leaf.grad for leaf in leaves.values()])
    for our, their in zip(*results, strict=True):
        if their is None:
            assert our is None
        else:
            assert_same_to_rounding([our], [their], roundings=32)
