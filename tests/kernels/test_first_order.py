"""Second derivatives: each operator has them right, or refuses; none loses a share in silence.

All that the package registers with torch is asked, so that no new operator is forgotten.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from beit_fast.kernels.attention import (
    attention,
    attention_qkvpacked,
    attention_reference,
    rel_pos_attention,
)
from beit_fast.kernels.attention.backends import use_backend
from beit_fast.kernels.attention.rel_pos_bias import rel_pos_bias, rel_pos_bias_reference
from beit_fast.kernels.head.gather_rows import gather_rows, gather_rows_reference
from beit_fast.kernels.head.linear_cross_entropy import (
    masked_linear_cross_entropy,
    masked_linear_cross_entropy_reference,
)
from beit_fast.kernels.input.mask_embed import mask_embed, mask_embed_reference
from beit_fast.kernels.linear import linear, linear_reference
from beit_fast.kernels.residual import layer_norm, scale_residual, scale_residual_norm
from beit_fast.model.pixel_loss import pixel_cross_entropy
from beit_fast.model.resize import resize_rel_pos_table
from beit_fast.train.batch_norm import _Gather, _ShareOfRank

ROOT = Path(__file__).resolve().parents[2]
# What gives integers, takes pixels, or detaches what it is given, as its docstring says.
WITHOUT_GRADIENT = {
    *("conv", "conv_add_", "conv_pixels", "linear_argmax", "normalized_patches", "pad_bias"),
    "ragged_views",
}
REFUSAL = "has first derivatives alone, and a second one is asked for: pass backend="


@dataclass(frozen=True)
class Case:
    """An operator as users call it, with the way out that its refusal names."""

    operator: str  # or the autograd.Function
    function: Callable[..., Tensor]  # of the leaves and a back end
    shapes: tuple[tuple[int, ...], ...]  # of the leaves
    backends: tuple[str | None, ...]
    way_out: str | None = None  # a back end; None: second derivatives are right as they are
    reference: Callable[..., Tensor] | None = None  # of the leaves; None: `function` on `way_out`


B, N, H, K, D, V = 2, 5, 2, 8, 16, 7
INDEX = [3, 7, 7, -1, 0]
MASK = [[True, False, False, True], [False, False, True, False]]


def index() -> Tensor:
    return torch.tensor(INDEX)


def pixel_labels() -> Tensor:
    return torch.tensor([[[0, 1, -1], [2, 2, 1]], [[1, -1, 0], [0, 1, 2]]])


def loss_of(*leaves, backend, **options):
    x, weight, bias, norm_weight, norm_bias = leaves
    inputs = (x, index(), torch.tensor([1, 2, 0, 5, 6]), weight, bias, norm_weight, norm_bias)
    if backend == "reference":
        return masked_linear_cross_entropy_reference(*inputs, **options)[0]
    return masked_linear_cross_entropy(*inputs, backend=backend, **options)[0]


def embedded(patches, cls_token, mask_token, pos, *, backend):
    return mask_embed(patches, cls_token, mask_token, torch.tensor(MASK), pos, backend=backend)


def embedded_reference(patches, cls_token, mask_token, pos):
    return mask_embed_reference(patches, cls_token, mask_token, torch.tensor(MASK), pos)


def out_and_lse(q, k, v, bias, *, backend):
    out, lse = attention(q, k, v, bias, backend=backend, return_lse=True)
    return torch.cat((out.flatten(), lse.flatten()))


def table_attention(q, k, v, table, *, backend):
    return rel_pos_attention(q, k, v, table, (2, 2), backend=backend)


def both_outputs(x, branch, weight, bias, gamma, *, backend):
    return torch.cat(scale_residual_norm(x, branch, weight, bias, gamma, backend=backend))


QKVB = ((B, N, H, K),) * 3 + ((H, N, N),)
OURS = {"backends": ("triton", "cpu"), "way_out": "reference"}
RESIDUAL = {"backends": ("triton",), "way_out": "torch"}
HEAD = ((B, N, D), (V, D), (V,), (D,), (D,))
LOSS = {"backends": ("triton", "torch"), "way_out": "reference"}
CASES = {
    "attention": Case("attention", attention, QKVB, **OURS),
    "attention-lse": Case("attention", out_and_lse, QKVB, **OURS),
    "attention-table": Case("attention", table_attention, (*QKVB[:3], (12, H)), **OURS),
    "packed": Case(
        "attention_qkvpacked", attention_qkvpacked, ((B, N, 3, H, K), (H, N, N)), **OURS
    ),
    "residual": Case("scale_residual", scale_residual, ((B, N, D), (B, N, D), (D,)), **RESIDUAL),
    "residual-norm": Case(
        "scale_residual", both_outputs, ((B, N, D), (B, N, D), (D,), (D,), (D,)), **RESIDUAL
    ),
    "layer-norm": Case("scale_residual", layer_norm, ((B, N, D), (D,), (D,)), **RESIDUAL),
    "loss": Case("masked_linear_cross_entropy", loss_of, HEAD, **LOSS),
    "loss-none": Case(
        "masked_linear_cross_entropy",
        lambda *leaves, backend: loss_of(*leaves, backend=backend, reduction="none"),
        HEAD,
        **LOSS,
    ),
    "gather_rows": Case(
        "gather_rows",
        lambda x, *, backend: gather_rows(x, index(), backend=backend),
        ((B, N, D),),
        ("triton", "torch"),
        reference=lambda x: gather_rows_reference(x, index()),
    ),
    "mask_embed": Case(
        "mask_embed",
        embedded,
        ((B, 4, D), (D,), (D,), (5, D)),
        ("triton", "torch"),
        reference=embedded_reference,
    ),
    "rel_pos_bias": Case(
        "rel_pos_bias",
        lambda table, *, backend: rel_pos_bias(table, (2, 2)),
        ((12, H),),
        (None,),
        reference=lambda table: rel_pos_bias_reference(table, (2, 2)),
    ),
    "resize": Case(
        "resize_rel_pos_table",
        lambda table, *, backend: resize_rel_pos_table(table, (2, 2), (3, 4)),
        ((12, H),),
        (None,),
        # Linear in the table: what it does to each unit of it, put together.
        reference=lambda table: sum(
            table[i, j] * resize_rel_pos_table(unit, (2, 2), (3, 4))
            for i in range(12)
            for j in range(H)
            for unit in [_unit(i, j)]
        ),
    ),
    "pixels": Case(
        "pixel_cross_entropy",
        lambda scores, *, backend: pixel_cross_entropy(scores, pixel_labels(), backend=backend)[0],
        ((2, 3, 2, 2),),
        (None,),
        way_out="reference",
    ),
    "batch-norm-gather": Case(
        "_Gather",
        lambda x, *, backend: _Gather.apply(x),
        ((3, 4),),
        (None,),
        reference=lambda x: x[None],
    ),
    "batch-norm-share": Case(
        "_ShareOfRank",
        lambda x, *, backend: _ShareOfRank.apply(x),
        ((1, 3, 4),),
        (None,),
        reference=lambda x: x.sum(0),
    ),
    "linear": Case(
        "_LinearOneDnn",
        lambda x, weight, bias, *, backend: linear(x, weight, bias),
        ((B, N, D), (V, D), (V,)),
        ("cpu",),
        reference=linear_reference,
    ),
}
REFUSING = {name: case for name, case in CASES.items() if case.way_out}


def _unit(i, j):
    unit = torch.zeros(12, H)
    unit[i, j] = 1
    return unit


def of(cases):
    return pytest.mark.parametrize(
        ("case", "backend"),
        [(case, backend) for case in cases.values() for backend in case.backends],
        ids=[f"{name}-{backend}" for name, case in cases.items() for backend in case.backends],
    )


def place(backend):
    """Where a back end runs: the kernels on the device, all else on the CPU."""
    return torch.get_default_device() if backend == "triton" else torch.device("cpu")


def weigh(out: Tensor, is_linear: bool) -> Tensor:
    """A loss: with constant weights, or with weights that depend on the outputs."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return (out * weights).sum() if is_linear else (out * out * weights).sum()


def seconds(function, leaves, is_linear) -> dict[tuple[int, int], Tensor | str]:
    """The gradient by leaf j of a product with the gradient by leaf i, or why there is none."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    loss = weigh(function(*leaves), is_linear)
    results = {}
    for i, gradient in enumerate(torch.autograd.grad(loss, leaves, create_graph=True)):
        probe = torch.linspace(-1, 2, gradient.numel(), dtype=gradient.dtype).view_as(gradient)
        for j, leaf in enumerate(leaves):
            result = None
            try:
                if gradient.requires_grad:
                    product = (gradient * probe).sum()
                    options = {"retain_graph": True, "allow_unused": True}
                    (result,) = torch.autograd.grad(product, leaf, **options)
            except RuntimeError as error:
                results[i, j] = str(error)
            else:
                results[i, j] = torch.zeros_like(leaf) if result is None else result
    return results


def all_operators() -> set[str]:
    """What the package registers with torch, and its autograd functions."""
    names = set()
    for path in [*ROOT.glob("kernels/**/*.py"), *ROOT.glob("beit_fast/**/*.py")]:
        text = path.read_text(encoding="utf-8")
        if "torch.library.define(" not in text and "autograd.Function)" not in text:
            continue
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = importlib.import_module(dotted.replace("kernels.", "beit_fast.kernels."))
        names |= {
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.autograd.Function)
        }
    names |= {
        name.removeprefix("beit_fast::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("beit_fast::")
    }
    return names - {"_Refusal"}


def test_every_operator_is_asked():
    asked = {case.operator for case in CASES.values()}
    backwards = {name for name in all_operators() if name.endswith("_backward")}
    assert {name.removesuffix("_backward") for name in backwards} <= asked
    assert all_operators() == asked | backwards | WITHOUT_GRADIENT


@of(CASES)
@pytest.mark.parametrize("is_linear", [True, False], ids=["linear-loss", "loss"])
def test_second_derivatives_are_right_or_refused(case, backend, is_linear):
    reference = case.reference or (lambda *leaves: case.function(*leaves, backend=case.way_out))
    with place(backend):
        leaves = [torch.randn(shape) for shape in case.shapes]
        wanted = seconds(reference, leaves, is_linear)
        results = seconds(
            lambda *leaves: case.function(*leaves, backend=backend), leaves, is_linear
        )
    for pair, want in wanted.items():
        if isinstance(results[pair], str):
            assert REFUSAL in results[pair]
            assert case.way_out is not None
        else:
            torch.testing.assert_close(results[pair], want, rtol=1e-4, atol=1e-5)
            assert case.way_out is None or not want.any(), pair


@of(REFUSING)
def test_a_gradient_of_which_no_other_is_asked_may_be_recorded(case, backend):
    """backward(create_graph=True) gives the gradients that backward() gives."""
    with place(backend):
        leaves = [torch.randn(shape).requires_grad_() for shape in case.shapes]
        loss = weigh(case.function(*leaves, backend=backend), False)
        plain = torch.autograd.grad(loss, leaves, retain_graph=True)
        recorded = torch.autograd.grad(loss, leaves, create_graph=True)
    for one, other in zip(plain, recorded, strict=True):
        assert torch.equal(one, other)
        assert other.requires_grad
        assert not one.requires_grad


@of(REFUSING)
def test_the_refusal_names_the_operator_and_a_way_out_that_works(case, backend):
    with place(backend):
        leaves = [torch.randn(shape).requires_grad_() for shape in case.shapes]
        loss = weigh(case.function(*leaves, backend=backend), False)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSAL) as refusal:
            sum(g.square().sum() for g in gradients).backward()
    message = str(refusal.value)
    assert message.startswith(case.operator.removesuffix("_qkvpacked"))
    assert f'backend="{case.way_out}"' in message
    with torch.device("cpu"):
        torch.manual_seed(1)
        leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in case.shapes]
        assert torch.autograd.gradgradcheck(
            lambda *leaves: case.function(*leaves, backend=case.way_out), leaves, fast_mode=True
        )


def test_the_way_out_for_whole_models_works():
    with torch.device("cpu"):
        leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in QKVB]
        with use_backend("reference"):
            assert torch.autograd.gradgradcheck(attention, leaves, fast_mode=True)
            out = attention(*leaves)
        torch.testing.assert_close(out, attention_reference(*leaves))


def test_frozen_inputs_leave_what_is_linear_alone():
    x, branch = (torch.randn(B, N, D, requires_grad=True) for _ in range(2))
    gamma = torch.randn(D)
    out = scale_residual(x, branch, gamma, backend="triton")
    gradients = torch.autograd.grad(out.sum(), (x, branch), create_graph=True)
    assert not any(gradient.requires_grad for gradient in gradients)  # they are constants


def test_a_compiled_operator_refuses_too():
    run = torch.compile(
        lambda *leaves: attention(*leaves, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    leaves = [torch.randn(shape, requires_grad=True) for shape in QKVB]
    gradients = torch.autograd.grad(run(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=re.escape("does not currently support double backward")):
        sum(gradient.sum() for gradient in gradients).backward()
