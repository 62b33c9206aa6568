"""The operator in torch: what it computes and keeps, and what it promises the compiler."""

import pytest
import torch

from beit_fast.kernels import _triton
from beit_fast.kernels._triton import record
from beit_fast.kernels.residual import scale_residual_norm, scale_residual_norm_reference
from beit_fast.kernels.residual.drop_path import draw_kept_samples
from residual_cases import BACKENDS, VECTORS, assert_same_to_rounding, rng_on, run

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")


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
