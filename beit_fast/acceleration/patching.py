"""Other libraries' BEiTs on our kernels: one call, that instance only, undone by another.

A replaced module keeps its attributes, parameters and hooks; its class becomes a subclass that this
package defines at the top of a module, with another `forward`. So names, state dicts, isinstance,
pickle and copies go on working, and no class of the library is touched.
"""

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn

from beit_fast.kernels.attention.backends import WIDEST_HEAD
from beit_fast.kernels.linear import NOT_TRACED, linear
from beit_fast.kernels.residual import layer_norm, scale_residual, scale_residual_norm
from beit_fast.model.layers import is_plain

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ADAPTERS = {
    "timm.models.beit": "beit_fast.acceleration.timm",
    "transformers.models.beit.modeling_beit": "beit_fast.acceleration.transformers",
}


@dataclass(frozen=True)
class Report:
    """What `accelerate` did, by the path of each module."""

    replaced: dict[str, str] = field(default_factory=dict)  # path -> what our kernels compute
    left: dict[str, str] = field(default_factory=dict)  # path -> why it runs as it did

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} modules replaced, {len(self.left)} left"]
        for what in dict.fromkeys(self.replaced.values()):
            paths = [path for path, value in self.replaced.items() if value == what]
            lines.append(f"  {what}: {len(paths)} ({paths[0]}{', ...' if paths[1:] else ''})")
        return "\n".join(lines + [f"  left {path}: {why}" for path, why in self.left.items()])


def accelerate(model: nn.Module) -> Report:
    """Run each timm or transformers BEiT in `model` on our kernels; `restore` undoes it.

    Parameters, state dict, outputs and first gradients stay (dropout of attention weights draws
    other random numbers at the same rate). Modules of subclasses, or with a `forward` of their own,
    are left and named in the report. A second call takes up what has been added since: after timm's
    `reset_classifier`, or a new head, call it again (until then that layer runs as its library has
    it, with the same results).
    Raises ValueError where there is no BEiT to accelerate.

    >>> report = accelerate(timm.create_model("beit_base_patch16_224"))  # doctest: +SKIP
    """
    adapters = [_import(ours) for theirs, ours in _ADAPTERS.items() if theirs in sys.modules]
    if not any(isinstance(m, a.MODELS) for a in adapters for m in model.modules()):
        raise ValueError(
            f"there is no timm Beit and no transformers BEiT in this {type(model).__name__}: pass "
            "one, or a module that contains one (our own models run on the kernels already)"
        )
    report = Report()
    for adapter in adapters:
        for path, module in _inside(model, adapter.MODELS):
            ours = _replacement(module, adapter.REPLACEMENTS)
            if ours is None:
                continue
            obstacle = _obstacle(module, ours)
            if obstacle is None:
                module.__class__ = ours
                module._bias_cache = BiasCache()
            if obstacle is None or type(module) is ours:
                report.replaced[path] = ours.runs
            else:
                report.left[path] = obstacle
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module has its library's class again.

    Raises ValueError, and changes nothing, where a module was given another class since.
    """
    modules = [(path, m) for path, m in model.named_modules() if isinstance(m, Accelerated)]
    for path, module in modules:
        if "replaces" not in vars(type(module)):
            raise ValueError(
                f"{path} has become a {type(module).__name__} since accelerate(): undo that first "
                "(a parametrization, or a wrapper that changes classes)"
            )
    for _, module in modules:
        module.__class__ = type(module).replaces
        del module._bias_cache


def _import(name: str) -> types.ModuleType:
    __import__(name)
    return sys.modules[name]


def _inside(
    module: nn.Module, kinds: tuple[type, ...], path: str = "", is_inside: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """All modules of the BEiTs in `module`, with their paths."""
    is_inside = is_inside or isinstance(module, kinds)
    if is_inside:
        yield path, module
    for name, child in module.named_children():
        yield from _inside(child, kinds, f"{path}.{name}" if path else name, is_inside)


def _replacement(module: nn.Module, replacements: tuple[type, ...]) -> type | None:
    """The class of ours for this module, or for the class it derives from."""
    for ours in replacements:
        if isinstance(module, ours.replaces):
            return ours
    return None


def _obstacle(module: nn.Module, ours: type) -> str | None:
    """Why the module is left as it is, or None."""
    kind = type(module)
    if kind is ours:
        return "accelerated already"
    if kind is not ours.replaces:
        return f"its class {kind.__module__}.{kind.__qualname__} may compute something else"
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    for name, parameter in module.named_parameters():
        if parameter.dtype not in _DTYPES:
            return f"{name} is {parameter.dtype}, the kernels take float32, bfloat16 and float16"
    return ours.obstacle(module)


class BiasCache:
    """The dense bias of a table that is not being trained, computed once until the table changes.

    On a CPU alone, where the whole table is compared with the one it was computed from (35 kB for
    Base at 224): version counters miss what is written through `.data` or by a CUDA graph. On a
    GPU to compare is to wait, and there the kernels read the table itself. Copies begin empty.
    """

    class _Entry(NamedTuple):
        key: Any
        table: Tensor
        bias: Tensor
        version: int

    def __init__(self) -> None:
        self._entry: BiasCache._Entry | None = None

    def __reduce__(self) -> tuple:
        return BiasCache, ()

    def holds(self, table: Tensor) -> bool:
        """Whether `get` would keep the bias of this table."""
        trained = table.requires_grad and torch.is_grad_enabled()
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return table.device.type == "cpu" and not trained and not traced

    def get(self, table: Tensor, key: Any, build: Callable[[Tensor], Tensor]) -> Tensor:
        """build(table), or what it gave before; `key` is all else that `build` depends on."""
        if not self.holds(table):
            return build(table)
        entry = self._entry
        if (
            entry is None
            or entry.key != key
            or entry.bias._version != entry.version  # a hook wrote into it
            or entry.table.dtype != table.dtype
            or not torch.equal(entry.table, table)
        ):
            # What inference mode makes could not be used in a training step later.
            with torch.inference_mode(False), torch.no_grad():
                table = table.detach().clone()
                bias = build(table)
            entry = self._entry = BiasCache._Entry(key, table, bias, bias._version)
        return entry.bias


class Accelerated:
    """What the replacing classes share."""

    replaces: ClassVar[type]  # the library's class
    runs: ClassVar[str]  # what our kernels compute in it

    @staticmethod
    def obstacle(module: nn.Module) -> str | None:
        """Why this instance cannot be replaced, or None."""
        return None

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script: raises ValueError that names the exporters of today."""
        raise ValueError(NOT_TRACED)

    def _as_leaf(self, tracer: fx.Tracer, *inputs: Any) -> fx.Proxy:
        """What torch.fx sees of this module where it is traced: one node, for kernels are no graph.

        `inputs` are those of forward.
        """
        return tracer.create_proxy("call_module", tracer.path_of_module(self), inputs, {})


class Linear(Accelerated, nn.Linear):
    replaces = nn.Linear
    runs = "linear"

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return self._as_leaf(x.tracer, x)
        if x.ndim < 2 or type(self.weight) not in (Tensor, nn.Parameter):  # or quantised, sharded
            return super().forward(x)
        return linear(x, self.weight, self.bias)


def head_obstacle(head_dim: int) -> str | None:
    """Why attention with heads of this width is left as it is, or None."""
    if head_dim > WIDEST_HEAD:
        return f"its heads have {head_dim} channels, the kernels take up to {WIDEST_HEAD}"
    return None


def normalize(x: Tensor, norm: nn.Module) -> Tensor:
    """norm(x), by the kernel where that is the same."""
    if _is_layer_norm(norm, x):
        return layer_norm(x, norm.weight, norm.bias, eps=norm.eps)
    return norm(x)


def add_branch(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: nn.Module,
    draw_keep: Callable[[nn.Module, Tensor, torch.dtype], Tensor | None] | None,
    norm: nn.Module | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x + drop_path(gamma branch), and the norm of it where one is given.

    `draw_keep(drop_path, branch, dtype)` draws (B,) factors as the library does, or gives None
    where no sample can be dropped; it is None where drop_path has to be called as it is.
    """
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    if draw_keep is None or x.ndim != 3:
        x = x + drop_path(branch if gamma is None else gamma * branch)
        return x, None if norm is None else normalize(x, norm)
    keep = draw_keep(drop_path, branch, dtype)
    dtype = torch.promote_types(x.dtype, dtype)
    if norm is None or not _is_layer_norm(norm, x):
        x = scale_residual(x, branch, gamma, keep, dtype=dtype)
        return x, None if norm is None else norm(x)
    vectors = (norm.weight, norm.bias, gamma)
    return scale_residual_norm(x, branch, *vectors, keep, eps=norm.eps, dtype=dtype)


def _is_layer_norm(norm: nn.Module, x: Tensor) -> bool:
    """Whether this is torch's LayerNorm over the channels of x (B, N, D), or timm's, unhooked."""
    kind = type(norm)
    is_timms = kind.__module__ == "timm.layers.norm" and kind.__name__ == "LayerNorm"
    if kind is not nn.LayerNorm and not (is_timms and not norm._fast_norm):
        return False
    return is_plain(norm, kind) and x.ndim == 3 and norm.normalized_shape == (x.shape[2],)
