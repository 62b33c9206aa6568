"""The program that `torch.save(module)` writes, followed without running anything of the file.

`pickletools` splits a pickle into its operations and a small machine of our own follows them:
classes become inert records of their name, the five calls that torch.save writes become plain
values, and any other name or operation is refused. Nothing is ever imported or looked up, so there
is nothing to call.
"""

import io
import math
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_MAX_DEPTH = 16

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_FUNCTIONS = {
    "collections.OrderedDict",
    "__builtin__.set",
    "builtins.set",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
}
_STORAGE = "torch.FloatStorage"


@dataclass(frozen=True)
class StoredTensor:
    """Where an fp32 tensor lies: elements `offset` ... of the storage `key` of `size` elements."""

    key: str
    size: int
    offset: int
    shape: tuple[int, ...]


@dataclass
class PickledModule:
    """A module of a file: its class by name, its plain attributes, its tensors and submodules."""

    class_name: str
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    children: dict[str, "PickledModule"] = field(default_factory=dict)

    def modules(self, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, "PickledModule"]]:
        """(dotted path, module) of this module and all below it, the path of this one being ''."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"modules are nested deeper than {_MAX_DEPTH} levels at {prefix}")
        yield prefix, self
        for name, child in self.children.items():
            yield from child.modules(f"{prefix}.{name}" if prefix else name, depth + 1)


@dataclass(frozen=True)
class _Name:
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    size: int


def run_pickle(stream: io.BytesIO, allowed_classes: frozenset[str]) -> Any:
    """The value that one pickle describes. Raises ValueError for what torch.save never writes."""
    machine = _Machine(allowed_classes)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"its pickle is damaged ({error!r})") from error
    raise ValueError("its pickle has no end")


class _Machine:
    """The pickle operations that torch.save writes for modules, over inert values."""

    def __init__(self, allowed_classes: frozenset[str]):
        self.allowed_classes = allowed_classes
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, operation: str, argument: Any) -> None:
        stack = self.stack
        match operation:
            case "PROTO":
                pass
            case _ if operation in _CONSTANTS:
                stack.append(_CONSTANTS[operation])
            case _ if operation in _LITERALS:
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(operation[-1]))))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "APPEND":
                self._extend(self._pop(1))
            case "APPENDS":
                self._extend(self._since_mark())
            case "SETITEM":
                self._set_items(self._pop(2))
            case "SETITEMS":
                self._set_items(self._since_mark())
            case "GLOBAL":
                stack.append(self._name(argument.replace(" ", ".", 1)))
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case "NEWOBJ":
                stack.append(self._new(*self._pop(2)))
            case "REDUCE":
                stack.append(self._call(*self._pop(2)))
            case "BUILD":
                self._build(stack.pop())
            case _:
                raise ValueError(f"torch.save never writes the pickle operation {operation}")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("pop from an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("its pickle appends to what is no list")
        self.stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError("its pickle sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise ValueError("its pickle has a dictionary key that is no string")
            self.stack[-1][key] = value

    def _name(self, name: str) -> _Name:
        if name in self.allowed_classes or name in _FUNCTIONS or name == _STORAGE:
            return _Name(name)
        raise ValueError(
            f"it names {name!r}, which is not among the {len(self.allowed_classes)} classes a file "
            "of this kind consists of; nothing was run. Get the file from its publisher"
        )

    def _persistent(self, identity: Any) -> Any:
        match identity:
            case ("storage", _Name(name=kind), str(key), _, int(size), *_) if kind == _STORAGE:
                return _Storage(key, size)
            case ("module", _Name() as name, *_):  # stream layout: a class with its source text
                return name
        raise ValueError(f"its pickle refers to something outside it: {brief(identity)}")

    def _new(self, name: Any, arguments: Any) -> PickledModule:
        if not isinstance(name, _Name) or name.name not in self.allowed_classes or arguments != ():
            raise ValueError(f"its pickle makes an object of {brief(name)}")
        return PickledModule(name.name)

    def _call(self, name: Any, arguments: Any) -> Any:
        match name, arguments:
            case _Name(name="collections.OrderedDict"), ():
                return {}
            case _Name(name="__builtin__.set" | "builtins.set"), ([],):
                return []
            case _Name(name="torch.device"), (str(kind), *_):
                return kind
            case (
                _Name(name="torch._utils._rebuild_tensor_v2"),
                (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_),
            ):
                return _stored_tensor(storage, offset, shape, strides)
            case _Name(name="torch._utils._rebuild_parameter"), (StoredTensor() as tensor, *_):
                return tensor
        raise ValueError(f"its pickle calls {brief(name)} with {brief(arguments)}")

    def _build(self, state: Any) -> None:
        module = self.stack[-1]
        if not isinstance(module, PickledModule) or not isinstance(state, dict):
            raise ValueError(f"its pickle sets the state of {brief(module)}")
        module.tensors = _members(state, "_parameters", StoredTensor)
        module.children = _members(state, "_modules", PickledModule)
        if state.get("_buffers"):
            raise ValueError(f"its {module.class_name} has buffers: {list(state['_buffers'])[:3]}")
        module.attributes = {
            key: value
            for key, value in state.items()
            if isinstance(value, bool | int | float | str)
        }


def _members(state: dict[str, Any], key: str, kind: type) -> dict[str, Any]:
    members = state.get(key, {})
    if not isinstance(members, dict):
        raise ValueError(f"its {key} is no dictionary")
    present = {name: value for name, value in members.items() if value is not None}
    if foreign := [name for name, value in present.items() if not isinstance(value, kind)]:
        raise ValueError(f"its {key} has {foreign[0]!r}, which is no {kind.__name__}")
    return present


def _stored_tensor(
    storage: _Storage, offset: int, shape: tuple[Any, ...], strides: tuple[Any, ...]
) -> StoredTensor:
    if not all(type(size) is int and size >= 0 for size in (offset, *shape)):
        raise ValueError(f"a tensor has the shape {brief(shape)} at {brief(offset)}")
    contiguous = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    differs = len(shape) != len(strides) or any(
        stride != expected and size > 1
        for stride, expected, size in zip(strides, contiguous, shape, strict=True)
    )
    if differs:
        raise ValueError(f"a tensor {shape} has the strides {brief(strides)}: it must be whole")
    return StoredTensor(storage.key, storage.size, offset, shape)


def brief(value: Any) -> str:
    """A value of the file for an error message; never walks into it."""
    if isinstance(value, _Name):
        return value.name
    if isinstance(value, int | float | str | bytes):
        return repr(value)[:80]
    return f"a {type(value).__name__}"
