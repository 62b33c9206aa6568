"""Residual and norm as users call them: the kernels by hand, torch's operators by default."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from beit_fast.kernels import _triton
from beit_fast.kernels._triton import Gpu, pretend
from beit_fast.kernels.residual import cpu as scale_residual_torch
from beit_fast.kernels.residual import (
    layer_norm,
    layer_norm_reference,
    scale_residual,
    scale_residual_norm,
    scale_residual_norm_reference,
    scale_residual_reference,
)
from beit_fast.kernels.residual.drop_path import draw_kept_samples
from residual_cases import BACKENDS, VECTORS, assert_same_to_rounding, inputs, rng_on, run

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_keep", [True, False], ids=["keep", "no-keep"])
@pytest.mark.parametrize("with_gamma", [True, False], ids=["gamma", "no-gamma"])
def test_as_exact_as_the_reference(assert_as_exact_as_reference, with_gamma, with_keep, dtype):
    x, branch, gamma, keep = inputs(with_gamma, with_keep)
    tensors = [t for t in (x, branch, gamma) if t is not None]

    def run(function):
        return lambda x, branch, gamma=None: function(x, branch, gamma, keep)

    assert_as_exact_as_reference(run(scale_residual), run(scale_residual_reference), tensors, dtype)


# Widths: three chunks of a warp's 256 columns; a power of two; fewer columns than chunk; none of
# the sizes that 16 bytes divide; more chunks with a rest.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [192, 768, 1024, 37, 1408])
def test_the_kernel_with_everything_is_as_exact_as_the_reference(
    assert_as_exact_as_reference, D, dtype, device
):
    B, N = 2, 3
    tensors = [torch.randn(B, N, D), torch.randn(B, N, D), *torch.randn(4, D)]
    rng = rng_on(device)
    drops = {"dropout_p": 0.25, "drop_path_p": 0.3, "rng": rng}

    def both(function, **backend):
        def call(x, branch, norm_weight, norm_bias, gamma, bias):
            vectors = (norm_weight, norm_bias, gamma)
            return torch.cat(function(x, branch, *vectors, bias=bias, **drops, **backend), dim=-1)

        return call

    assert_as_exact_as_reference(
        both(scale_residual_norm, backend="triton"),
        both(scale_residual_norm_reference),
        [t.to(device) for t in tensors],
        dtype,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["all", "keep", "drop_path", "kept"])
@pytest.mark.parametrize("norm", ["none", "plain", "affine"])
def test_every_combination_of_parts_agrees_with_the_reference(norm, way, backend, device):
    B, N, D = 3, 2, 32
    kept = draw_kept_samples(B, 0.4, device) if way == "kept" else None
    C = B if kept is None else len(kept.samples)
    for gamma, bias, dropout_p, norm_kept in itertools.product(
        (False, True), (False, True), (0.0, 0.3), (None, draw_kept_samples(B, 0.4, device))
    ):
        if norm == "none" and norm_kept is not None:
            continue
        names = [*VECTORS[:2]] * (norm == "affine") + ["gamma"] * gamma + ["bias"] * bias
        tensors = {"x": torch.randn(B, N, D), "branch": torch.randn(C, N, D)}
        tensors |= {name: torch.randn(D) for name in names}
        if way == "keep":
            tensors["keep"] = torch.tensor([1.25, 0.0, 1.25])
        options = {"kept": kept, "dropout_p": dropout_p, "rng": rng_on(device)}
        options["drop_path_p"] = 0.5 if way == "drop_path" else 0.0
        functions = (scale_residual, scale_residual_reference)
        if norm != "none":
            functions = (scale_residual_norm, scale_residual_norm_reference)
            options["norm_kept"] = norm_kept
        num_normed = B if norm_kept is None else len(norm_kept.samples)
        douts = torch.randn(B, N, D), torch.randn(num_normed, N, D)
        ours = run(functions[0], tensors, douts, device, **options, backend=backend)
        assert_same_to_rounding(ours, run(functions[1], tensors, douts, device, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_kept", [False, True], ids=["all", "kept"])
def test_the_norm_alone_agrees_with_the_reference(with_kept, backend, device):
    x, weight, bias = torch.randn(3, 5, 48), torch.randn(48), torch.randn(48)
    kept = draw_kept_samples(3, 0.4, device) if with_kept else None
    dln = torch.randn(3 if kept is None else len(kept.samples), 5, 48)
    for tensors in ({"x": x}, {"x": x, "weight": weight, "bias": bias}):
        ours = run(layer_norm, tensors, [dln], device, kept=kept, backend=backend)
        theirs = run(layer_norm_reference, tensors, [dln], device, kept=kept)
        assert_same_to_rounding(ours, theirs)


def test_reference_is_the_formula():
    x, branch, gamma, keep = inputs(True, True)
    bias, weight, shift = torch.randn(3, 64)
    out, ln = scale_residual_norm_reference(x, branch, weight, shift, gamma, keep, bias=bias)
    row = x[1, 5] + 1.25 * gamma * (branch[1, 5] + bias)
    torch.testing.assert_close(out[1, 5], row)
    expected = (row - row.mean()) / (row.var(correction=0) + 1e-6).sqrt() * weight + shift
    torch.testing.assert_close(ln[1, 5], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-6, 1e-12, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_is_inside_the_root(eps, backend, device):
    x = 1e-2 * torch.randn(1, 2, 32, device=device)
    out, ln = scale_residual_norm(x, torch.zeros_like(x), eps=eps, backend=backend)
    torch.testing.assert_close(ln, torch.nn.functional.layer_norm(out, (32,), eps=eps))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_sample_passes_unchanged_and_its_branch_gets_no_gradient(backend, device):
    x, branch, gamma, keep = (t.to(device) for t in inputs(True, True, num_tokens=9))
    branch[0] = torch.nan if backend == "triton" else 1.0  # what is dropped is not even read
    branch.requires_grad_()
    out = scale_residual(x, branch, gamma, keep, backend=backend)
    out.sum().backward()
    assert torch.equal(out[0], x[0])
    assert not branch.grad[0].any()
    assert branch.grad[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bf16_branch_joins_an_fp32_stream_in_fp32(backend, device):
    x, branch, gamma, keep = (t.to(device) for t in inputs(True, True, num_tokens=9))
    branch = branch.bfloat16()
    for options in ((gamma, keep), (gamma, None), (None, keep), (None, None)):
        out = scale_residual(x, branch, *options, backend=backend)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, scale_residual_reference(x, branch, *options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("stream", "branch_dtype", "dtype", "norm_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32, torch.float16),
    ],
)
def test_each_of_the_four_dtypes_is_chosen_alone(
    stream, branch_dtype, dtype, norm_dtype, backend, device
):
    x = torch.randn(2, 3, 64, device=device).to(stream).requires_grad_()
    branch = torch.randn(2, 3, 64, device=device).to(branch_dtype).requires_grad_()
    gamma = torch.randn(64, device=device, requires_grad=True)
    weight, bias = torch.randn(2, 64, device=device)
    dtypes = {"dtype": dtype, "norm_dtype": norm_dtype}
    arguments = (x, branch, weight, bias, gamma)
    results = []
    for function, options in (
        (scale_residual_norm, {"backend": backend}),
        (scale_residual_norm_reference, {}),
    ):
        out, ln = function(*arguments, **dtypes, **options)
        assert (out.dtype, ln.dtype) == (dtype, norm_dtype)
        gradients = torch.autograd.grad(
            out.float().sum() + ln.float().square().sum(), arguments[:2]
        )
        assert [g.dtype for g in gradients] == [stream, branch_dtype]
        results.append([out, ln, *gradients])
    for our, their in zip(*results, strict=True):
        error = (our.float() - their.float()).abs().max() / their.float().abs().max()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_stream_and_gives_the_next_linear_its_dtype(backend, device):
    x, branch = torch.randn(2, 3, 32, device=device), torch.randn(2, 3, 32, device=device)
    weight = torch.randn(32, device=device)
    branch = branch.bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        out, ln = scale_residual_norm(x, branch, weight, gamma=weight, backend=backend)
        alone = layer_norm(x, weight, backend=backend)
    assert (out.dtype, ln.dtype, alone.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    expected = scale_residual_norm(x, branch, weight, gamma=weight, backend=backend)
    assert torch.equal(out, expected[0])
    assert torch.equal(ln, expected[1].bfloat16())


def test_shapes_that_do_not_fit_are_refused_by_name():
    x, branch, gamma, keep = inputs(True, True)
    with pytest.raises(ValueError, match="pass both as \\(B, N, D\\)"):
        scale_residual(x, branch[:, 1:])
    with pytest.raises(ValueError, match=r"gamma is .* \(63,\): pass floats \(64,\)"):
        scale_residual(x, branch, gamma[1:])
    with pytest.raises(ValueError, match=r"keep is .* \(2,\): pass floats \(3,\)"):
        scale_residual(x, branch, gamma, keep[1:])
    with pytest.raises(ValueError, match=r"the branch's bias is .* \(63,\)"):
        scale_residual(x, branch, bias=gamma[1:])
    with pytest.raises(ValueError, match=r"the norm's weight is .* \(63,\)"):
        scale_residual_norm(x, branch, gamma[1:])
    with pytest.raises(ValueError, match="pass \\(B, N, D\\)"):
        layer_norm(x[0], gamma)
    with pytest.raises(ValueError, match="pass rates in \\[0, 1\\)"):
        scale_residual(x, branch, dropout_p=1.0)
    with pytest.raises(ValueError, match="pass one of keep, drop_path_p and kept"):
        scale_residual(x, branch, keep=keep, drop_path_p=0.1)
    with pytest.raises(ValueError, match="pass \\(2, N, D\\), the kept samples"):
        scale_residual(x, branch, kept=draw_kept_samples(3, 0.4))
    with pytest.raises(ValueError, match="drawn from 4, x has 3"):
        layer_norm(x, kept=draw_kept_samples(4, 0.4))
    with pytest.raises(ValueError, match=rf"rng is torch.int32 \(2,\) on {x.device}: pass int64"):
        scale_residual(x, branch, dropout_p=0.1, rng=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="pass one of triton, torch, or None"):
        scale_residual(x, branch, backend="cuda")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"shape": (2, 3, 8200)}, "rows of up to 8192 channels, not 8200"),
        ({"shape": (2**15, 2**15, 64)}, "fewer than 1073741824 rows"),
        ({"capability": (7, 5)}, r"need compute capability 8.0, this GPU has \(7, 5\)"),
    ],
    ids=["fp64", "wide", "many-rows", "old-gpu"],
)
def test_a_fallback_on_cuda_says_why_once_and_a_wish_is_refused(fields, reason, monkeypatch):
    monkeypatch.setattr(_triton, "_warned", set())
    monkeypatch.setattr(_triton, "can_launch", lambda tensor: True)
    fields = {"dtype": torch.float32, "shape": (2, 3, 64), "capability": (9, 0)} | fields
    x = SimpleNamespace(device=torch.device("cuda"), dtype=fields["dtype"], shape=fields["shape"])
    choose = scale_residual_torch.choose_backend
    with pretend(Gpu(fields["capability"], 132, 1 << 20)):
        with pytest.warns(UserWarning, match=f"runs on torch, slower: .*{reason}"):
            assert choose(x, None, (), None) == "torch"
        assert choose(x, None, (), None) == "torch"  # a second warning would be an error
        with pytest.raises(ValueError, match=f"cannot run here: .*{reason}"):
            choose(x, None, (), "triton")
