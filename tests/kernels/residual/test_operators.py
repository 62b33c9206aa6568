"""By hand: the kernels in Triton's interpreter; by default on a CPU: torch's own operators."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from beit_fast.kernels import _triton
from beit_fast.kernels._triton import Gpu, pretend, record
from beit_fast.kernels.philox import draw_rng, keep_mask_reference
from beit_fast.kernels.residual import cpu as scale_residual_torch
from beit_fast.kernels.residual import (
    layer_norm,
    layer_norm_reference,
    scale_residual,
    scale_residual_norm,
    scale_residual_norm_reference,
    scale_residual_reference,
)
from beit_fast.kernels.residual.drop_path import draw_kept_samples, drop_path_keep_reference

BACKENDS = ("triton", "torch")
SEED_AND_OFFSET = (2**61 + 977, 2**33 + 5)
VECTORS = ("norm_weight", "norm_bias", "gamma", "bias")


@pytest.fixture(autouse=True)
def _new_memory_is_nan():
    """An element that nobody writes shows: in this mode torch fills `empty`."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(with_gamma: bool, with_keep: bool, num_tokens: int = 197):
    x, branch = torch.randn(2, 3, num_tokens, 64)
    gamma = torch.randn(64) if with_gamma else None
    keep = torch.tensor([0.0, 1.25, 1.25]) if with_keep else None
    return x, branch, gamma, keep


def rng_on(device):
    return torch.tensor(SEED_AND_OFFSET, device=device)


def run(function, tensors, douts, device, **options):
    """Outputs and the gradients of all tensors but keep, given the outputs' gradients."""
    leaves = {
        name: t.to(device).requires_grad_() if name != "keep" else t.to(device)
        for name, t in tensors.items()
    }
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [d.to(out.device, out.dtype) for d, out in zip(douts, outputs, strict=False)]
    trained = [t for name, t in leaves.items() if name != "keep"]
    return [*outputs, *torch.autograd.grad(outputs, trained, douts)]


def assert_same_to_rounding(ours, theirs, roundings=8):
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our.shape == their.shape
        assert our.dtype == their.dtype
        if their.numel():
            allowed = roundings * torch.finfo(torch.float32).eps * their.abs().max().clamp(min=1)
            error = (our - their).abs().max()
            assert error <= allowed, f"result {number}: error {error:.1e}, allowed {allowed:.1e}"


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


def test_the_mask_of_the_kernel_is_that_of_the_reference_forward_and_backward(device):
    B, N, D = 2, 5, 200
    rng = rng_on(device)
    x = torch.zeros(B, N, D, device=device)
    branch = torch.ones(B, N, D, device=device, requires_grad=True)
    out = scale_residual(x, branch, dropout_p=0.3, rng=rng, backend="triton")
    streams = torch.arange(B * N, device=device)
    mask = keep_mask_reference(rng, 0.3, 1, D, streams).view(B, N, D)
    assert torch.equal(out != 0, mask)
    torch.testing.assert_close(out[mask], torch.full_like(out[mask], 1 / 0.7))
    out.sum().backward()
    assert torch.equal(branch.grad, out.detach())


def test_the_samples_that_the_kernel_drops_are_those_of_the_reference(device):
    B = 40
    rng = rng_on(device)
    x, branch = torch.zeros(B, 1, 16, device=device), torch.ones(B, 1, 16, device=device)
    out = scale_residual(x, branch, drop_path_p=0.3, rng=rng, backend="triton")
    keep = drop_path_keep_reference(rng, 0.3, B)
    assert torch.equal(out[:, 0, 0], keep / 0.7)
    assert 0 < keep.sum() < B


def test_rewriting_the_rng_in_place_draws_other_masks(device):
    rng = rng_on(device)
    x, branch = torch.zeros(1, 2, 64, device=device), torch.ones(1, 2, 64, device=device)

    def draw():
        return scale_residual(x, branch, dropout_p=0.5, rng=rng, backend="triton")

    first, again = draw(), draw()
    rng[1] += 1  # what a graph that holds `draw_rng` does at each replay
    assert torch.equal(first, again)
    assert not torch.equal(first, draw())


def test_without_an_rng_each_call_draws_from_the_default_generator():
    x, branch = torch.zeros(2, 3, 64), torch.ones(2, 3, 64)
    torch.manual_seed(3)
    first, second = (scale_residual(x, branch, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, scale_residual(x, branch, dropout_p=0.5))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    rng = draw_rng(x.device)
    assert torch.equal(first, scale_residual(x, branch, dropout_p=0.5, rng=rng))


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


def launches_of_backward(trained, **options):
    tensors = {"x": torch.randn(2, 3, 32), "branch": torch.randn(2, 3, 32)}
    tensors |= {name: torch.randn(32) for name in VECTORS}
    for name in trained:
        tensors[name].requires_grad_()
    with record() as launches:
        out, ln = scale_residual_norm(**tensors, **options, backend="triton")
        forward = len(launches)
        torch.autograd.backward((out, ln), (torch.ones_like(out), torch.ones_like(ln)))
    return launches[forward:]


@pytest.mark.parametrize(
    ("trained", "written"),
    [
        (("x",), ("dx_ptr",)),
        (("branch",), ("dbranch_ptr",)),
        (("x", "branch"), ("dx_ptr", "dbranch_ptr")),
        (("x", "gamma"), ("dx_ptr", "dgamma_ptr")),
        (("norm_weight", "norm_bias"), ("dnorm_weight_ptr", "dnorm_bias_ptr")),
        (("bias",), ("dbias_ptr",)),
    ],
    ids=str,
)
def test_what_is_frozen_is_neither_read_nor_written(trained, written):
    if not torch.cuda.is_available():
        kernel, *sums = launches_of_backward(trained)
        outputs = {
            f"d{n}_ptr" for n in ("x", "branch", "bias", "gamma", "norm_weight", "norm_bias")
        }
        assert {name for name in outputs if kernel.arguments[name] is not None} == set(written)
        assert (kernel.arguments["branch_ptr"] is not None) == ("gamma" in trained)
        vectors = set(written) - {"dx_ptr", "dbranch_ptr"}
        assert len(sums) == bool(vectors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_branch_is_kept_for_gamma_alone(backend, device):
    x, branch = (torch.randn(2, 8, 64, device=device, requires_grad=True) for _ in range(2))
    gamma = torch.randn(64, device=device)

    def saved_bytes():
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.update({t.data_ptr(): t.nbytes}), lambda t: t
        ):
            scale_residual_norm(x, branch, gamma=gamma, backend=backend)
        return sum(saved.values())

    without = saved_bytes()
    gamma.requires_grad_()
    assert saved_bytes() - without == branch.nbytes


@pytest.mark.parametrize("by", ["kernel", "reference"])
def test_the_operators_pass_opcheck(by, device, monkeypatch):
    if by == "reference":
        monkeypatch.setattr("beit_fast.kernels.residual.operators.interpreting", lambda: False)
    x, branch, compact = (
        torch.randn(C, 2, 32, device=device, requires_grad=True) for C in (3, 3, 2)
    )
    vectors = [torch.randn(32, device=device, requires_grad=True) for _ in range(4)]
    slots = draw_kept_samples(3, 0.4, device).slots
    rng, types = rng_on(device), (torch.float32, torch.float32)
    bias, gamma, weight, shift = vectors
    forward = torch.ops.beit_fast.scale_residual.default
    drops = (rng, 0.2, 0.0)
    for arguments in (
        (x, branch, bias, gamma, None, None, *drops, weight, shift, slots, 2, 1e-6, *types),
        (x, compact, None, gamma, None, slots, *drops, None, None, None, 3, None, *types),
        (x, None, None, None, None, None, None, 0.0, 0.0, weight, shift, None, 3, 1e-6, *types),
    ):
        torch.library.opcheck(forward, arguments)
    backward = torch.ops.beit_fast.scale_residual_backward.default
    dout, dln = torch.randn(3, 2, 32, device=device), torch.randn(2, 2, 32, device=device)
    statistics = torch.rand(2, 2, device=device), torch.rand(2, 2, device=device)
    x, branch, *vectors = (t.detach() for t in (x, branch, *vectors))
    options = (vectors[0], vectors[1], None, None, *drops, vectors[2])
    sizes = ((3, 2, 32), 3, *types)
    for needs in ([True] * 6, [False, True, False, False, False, False]):
        arguments = (dout, dln, x, *statistics, branch, *options, slots, *sizes, needs)
        torch.library.opcheck(backward, arguments)


def test_the_operator_on_a_cpu_is_the_reference(monkeypatch):
    monkeypatch.setattr("beit_fast.kernels.residual.operators.interpreting", lambda: False)
    monkeypatch.setattr(_triton, "can_launch", lambda tensor: True)  # chosen where kernels run
    cpu = torch.device("cpu")
    with cpu:
        kept = draw_kept_samples(3, 0.4)
        tensors = {"x": torch.randn(3, 4, 48), "branch": torch.randn(len(kept.samples), 4, 48)}
        tensors |= {name: torch.randn(48) for name in VECTORS}
        douts = torch.randn(3, 4, 48), torch.randn(len(kept.samples), 4, 48)
        options = {"kept": kept, "norm_kept": kept, "dropout_p": 0.3, "rng": rng_on(cpu)}
        ours = run(scale_residual_norm, tensors, douts, cpu, **options, backend="triton")
        theirs = run(scale_residual_norm_reference, tensors, douts, cpu, **options)
    assert_same_to_rounding(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend, device):
    tensors = {"x": torch.randn(2, 3, 32), "branch": torch.randn(2, 3, 32)}
    tensors |= {name: torch.randn(32) for name in VECTORS}
    douts = torch.randn(2, 2, 3, 32)
    options = {"dropout_p": 0.2, "drop_path_p": 0.2, "rng": rng_on(device), "backend": backend}
    compiled = torch.compile(scale_residual_norm, fullgraph=True, backend="aot_eager")
    ours = run(compiled, tensors, douts, device, **options)
    assert_same_to_rounding(ours, run(scale_residual_norm, tensors, douts, device, **options))


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


def test_a_checkpoint_draws_the_same_masks_again(device):
    x, branch = (torch.randn(2, 3, 64, device=device, requires_grad=True) for _ in range(2))

    def step(x, branch):
        return scale_residual_norm(x, branch, dropout_p=0.5, backend="triton")

    results = []
    for function in (step, lambda *a: checkpoint(step, *a, use_reentrant=False)):
        torch.manual_seed(4)
        out, ln = function(x, branch)
        results.append([out, ln, *torch.autograd.grad(out.sum() + ln.square().sum(), (x, branch))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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
        with pytest.warns(UserWarning, match=f"runs on torch's operators, slower: .*{reason}"):
            assert choose(x, None, (), None) == "torch"
        assert choose(x, None, (), None) == "torch"  # a second warning would be an error
        with pytest.raises(ValueError, match=f"cannot run here: .*{reason}"):
            choose(x, None, (), "triton")
