"""A GPU machine on a CPU: tensors that know where they would be, and operations that check it.

`GPU` is `torch.device("cpu", 0)`. PyTorch forgets the index of a CPU, so every tensor lies in host
memory and `device.type` is "cpu"; inside `TwoDevices` the storage of a tensor that was made there
says so, `tensor.device` answers with the index, an operation that mixes the two raises what CUDA
raises, and a Triton kernel takes tensors of `GPU` alone. What PyTorch lets through passes: CPU
scalars beside GPU tensors, CPU indices into GPU tensors, copies. Generators are not checked.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.trace_rules import get_tensor_method, get_torch_obj_rule_map
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves

GPU = torch.device("cpu", 0)
CPU = torch.device("cpu")

_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_true_device = torch._C.TensorBase.device.__get__
_aten = torch.ops.aten
_MOVES = {
    _aten.copy_.default,
    _aten._to_copy.default,
    _aten._foreach_copy_.default,
    _aten._local_scalar_dense.default,
}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._unsafe_index.Tensor,
    _aten._unsafe_index_put.default,
    _aten._index_put_impl_.default,
}

_JOINING = {_aten.cat.default, _aten.stack.default}  # CUDA takes no scalar of the CPU here


def _means_gpu(device: torch.device | str) -> bool:
    return torch.device(device) == GPU


def _lies_in_memory(value: object) -> bool:
    """Whether it is a tensor whose storage can tell: not fake, meta, sparse or a wrapper."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and _true_device(value).type == "cpu"
        and value.layout is torch.strided
    )


def _on_gpu(tensor: Tensor) -> bool | None:
    """Where it would be; None if C++ made it in a backward, which knows no index."""
    return getattr(tensor.untyped_storage(), "on_gpu", False)


def _on_cpu(tensor: Tensor) -> bool:
    return _on_gpu(tensor) is False


def _place(tensor: Tensor, on_gpu: bool) -> Tensor:
    tensor.untyped_storage().on_gpu = on_gpu
    return tensor


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    return [value] if _lies_in_memory(value) else []


def _written(func: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(
                args[position] if position < len(args) else kwargs.get(argument.name)
            )


def _refuse_mixed(func: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
    """Raise as CUDA does unless all of a call's tensors may meet; some of them are on the GPU."""
    if func in _MOVES:
        return
    if func in _INDEXING:
        if _on_cpu(args[0]) and any(map(_on_gpu, _tensors(args[1]))):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        tensors = _tensors([args[0], *args[2:]])
    if any((t.dim() or func in _JOINING) and _on_cpu(t) for t in tensors) or any(
        map(_on_cpu, _written(func, args, kwargs))
    ):
        places = (f"{'cuda:0' if _on_gpu(t) else 'cpu'} {tuple(t.shape)}" for t in tensors)
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func} of {', '.join(places)})"
        )


def _mark(out: object, on_gpu: bool | None) -> object:
    """Let memory that is new say where it would be."""
    for tensor in _tensors(out):
        storage = tensor.untyped_storage()
        if not hasattr(storage, "on_gpu"):
            storage.on_gpu = on_gpu
    return out


class TwoDevices(TorchDispatchMode):
    """Within it every operation of this thread is checked, and what it makes is marked."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):  # of a compiled graph, which was checked
            return _mark(
                func(*args, **kwargs), any(map(_on_gpu, _tensors([*args, *kwargs.values()])))
            )
        if func.namespace == "beit_fast" and _tensors(args):  # Python: what it calls is checked
            with self:
                return func.redispatch(_CPU_KERNEL, *args, **kwargs)
        tensors = _tensors(args)
        if kwargs:
            tensors += _tensors(list(kwargs.values()))
        on_gpu = any(map(_on_gpu, tensors))
        if on_gpu:
            _refuse_mixed(func, args, kwargs, tensors)
        out = func(*args, **kwargs)
        device = kwargs.get("device")
        if not tensors and torch._C._current_graph_task_id() != -1:
            on_gpu = None
        if device is not None and _means_gpu(device):
            on_gpu = True  # else the device of a factory, or of C++, which knows no index
        return _mark(out, on_gpu)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Move(torch.autograd.Function):
    """A copy on the other device, whose gradient goes back there."""

    @staticmethod
    def forward(ctx, x: Tensor, on_gpu: bool) -> Tensor:
        ctx.on_gpu = _on_gpu(x)
        return _place(x.detach().clone(), on_gpu)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Move.apply(grad, ctx.on_gpu), None


class _Generator(torch.Generator):
    def __new__(cls, device: torch.device | str = CPU):
        made = super().__new__(cls, CPU)
        made.on_gpu = _means_gpu(device)
        return made

    @property
    def device(self) -> torch.device:
        return GPU if self.on_gpu else CPU


def _checking() -> bool:
    return any(isinstance(mode, TwoDevices) for mode in _get_current_dispatch_mode_stack())


@contextlib.contextmanager
def two_devices() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    _patch_torch(patch)
    _patch_triton(patch)
    try:
        with TwoDevices():
            yield
    finally:
        patch.undo()


def _patch_torch(patch: pytest.MonkeyPatch) -> None:
    """The calls that name a device and never reach the dispatcher, or reach it without the name."""
    # Dynamo looks torch's functions up by name at first use, and keeps what it found.
    get_torch_obj_rule_map(), get_tensor_method()

    def device(self: Tensor) -> torch.device:
        true = _true_device(self)
        return GPU if _lies_in_memory(self) and _on_gpu(self) else true

    patch.setattr(Tensor, "device", property(device), raising=False)

    def to(self: Tensor, *args, **kwargs) -> Tensor:
        if not _lies_in_memory(self):
            return true_to(self, *args, **kwargs)
        args, target = list(args), None
        if args and isinstance(args[0], Tensor):
            target, args[:1] = args[0].device, [args[0].dtype]
        elif args and isinstance(args[0], torch.device | str):
            target = args.pop(0)
        if "other" in kwargs:
            other = kwargs.pop("other")
            target, kwargs["dtype"] = other.device, other.dtype
        if kwargs.get("device") is not None:
            target = kwargs.pop("device")
        moved = self
        if target is not None and torch.device(target).type != "cpu":
            return true_to(self, target, *args, **kwargs)
        if target is not None and _means_gpu(target) != _on_gpu(self):
            moved = _Move.apply(self, _means_gpu(target))
        if args and args[0] is None:
            args.pop(0)
        if any(isinstance(a, torch.dtype) for a in args) or kwargs:
            return true_to(moved, *args, **kwargs)
        return true_to(moved, moved.dtype, *args)

    true_to = Tensor.to
    patch.setattr(Tensor, "to", to)
    patch.setattr(Tensor, "cpu", lambda self, *args, **kwargs: self.to("cpu"))

    def numpy(self: Tensor, **kwargs):
        if _lies_in_memory(self) and _on_gpu(self) and not kwargs.get("force"):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return true_numpy(self, **kwargs)

    true_numpy = Tensor.numpy
    patch.setattr(Tensor, "numpy", numpy)

    def from_data(true: Callable) -> Callable:
        def make(*args, **kwargs):
            if torch.compiler.is_compiling():
                return true(*args, **kwargs)
            device = kwargs.get("device")
            if device is None and isinstance(args[0] if args else None, Tensor):
                device = args[0].device
            if device is None:  # `get_default_device` may ask `torch.tensor`
                device = torch.empty(0).device
            return _place(true(*args, **kwargs), _means_gpu(device))

        return make

    names = ("tensor", "as_tensor", "asarray", "from_file")
    true_factories = {name: getattr(torch, name) for name in names}
    for name, true in true_factories.items():
        patch.setattr(torch, name, from_data(true))
    patch.setattr(Tensor, "new_tensor", from_data(Tensor.new_tensor))
    patch.setattr(torch, "Generator", _Generator)

    def clone(self):  # how copy.deepcopy copies a tensor
        copied = true_clone(self)
        if hasattr(self, "on_gpu"):
            copied.on_gpu = self.on_gpu
        return copied

    true_clone = torch.UntypedStorage.clone
    patch.setattr(torch.UntypedStorage, "clone", clone, raising=False)

    def compile(model=None, **options):
        if model is None:
            return lambda model: compile(model, **options)
        compiled = true_compile(model, **options)

        def run(*args, **kwargs):
            owner = getattr(model, "__self__", model)
            given = _tensors(tree_leaves((args, kwargs)))
            if isinstance(owner, torch.nn.Module):
                given += [*owner.parameters(), *owner.buffers()]
            with pytest.MonkeyPatch.context() as bare:  # Dynamo knows torch's own functions
                for name in ("to", "cpu", "numpy", "new_tensor"):
                    bare.delattr(Tensor, name)  # they are inherited
                for name, true in true_factories.items():
                    bare.setattr(torch, name, true)
                out = compiled(*args, **kwargs)
            on_gpu = any(map(_on_gpu, given)) if given else _means_gpu(torch.empty(0).device)
            for tensor in _tensors(tree_leaves(out)):
                _place(tensor, on_gpu)
            return out

        return run

    true_compile = torch.compile
    patch.setattr(torch, "compile", compile)

    def hide(true: Callable) -> Callable:
        def run(*args, **kwargs):
            with _disable_current_modes():
                return true(*args, **kwargs)

        return run

    patch.setattr(torch.library, "opcheck", hide(torch.library.opcheck))
    patch.setattr(torch.export, "export", hide(torch.export.export))


def _patch_triton(patch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    from beit_fast.kernels import _triton
    from beit_fast.kernels.residual import operators as scale_residual

    def check(number: int, value: Any) -> None:
        value = getattr(value, "base", value)  # of a tensor descriptor
        for each in value if isinstance(value, tuple) else (value,):
            if _lies_in_memory(each) and _on_cpu(each):
                raise ValueError(
                    f"Pointer argument (at {number}) cannot be accessed from Triton (cpu tensor?)"
                )

    def run(self, *args, **kwargs):
        if _checking():
            for number, value in enumerate([*args, *kwargs.values()]):
                check(number, value)
        with _disable_current_modes():
            return true_run(self, *args, **kwargs)

    true_run = GridExecutor.__call__
    patch.setattr(GridExecutor, "__call__", run)

    def can_launch(tensor: Tensor) -> bool:
        able = true_can_launch(tensor)
        if torch.compiler.is_compiling() or _triton._recorded or not _checking():
            return able
        return able and not (_lies_in_memory(tensor) and _on_cpu(tensor))

    true_can_launch = _triton.can_launch
    patch.setattr(_triton, "can_launch", can_launch)
    patch.setattr(scale_residual, "_takes_reference", lambda tensor: not can_launch(tensor))
