"""The tensors of a module that was pickled whole, read without running anything of the file.

`torch.save(module)` writes a program for a stack machine that names classes and functions to call.
Loading it means trusting it. Here `pickletools` splits it into its operations and a small machine
of our own follows them: classes become inert records of their name, the five calls that torch.save
writes become plain values, and any other name or operation is refused. Nothing is ever imported or
looked up, so there is nothing to call; the file decides only which of its bytes are which tensor.

Both layouts are read: the zip archive (torch >= 1.6) with its checksums, and the plain stream of
earlier versions, which `torch.load(weights_only=True)` refuses for modules even with an allow list.

Source    torch/serialization.py, `_save` and `_legacy_save`
"""

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_fast.files import refuse_other_kinds

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # first two pickles of the stream layout
_MAX_PICKLE_BYTES = 2**24  # of the part without weights; DALL-E's takes 30 kB
_MAX_MODULES, _MAX_DEPTH = 10_000, 16
_ITEM_BYTES = 4  # fp32
# What zipfile raises for archives that no program would write.
_DAMAGE = (
    ValueError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
)

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


def read_pickled_module(
    path: str | Path, allowed_classes: frozenset[str]
) -> tuple[PickledModule, Callable[[], dict[str, Tensor]]]:
    """The module pickled in `path`, and a function that reads its tensors by their dotted names.

    Names and shapes are known before a weight is read, so they can be checked first.
    allowed_classes: full names of the module classes that the file may hold. Tensors are fp32 and
    contiguous. Raises FileNotFoundError, and ValueError for a file that names anything else, is cut
    short, or contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    refuse_other_kinds(path, "a pickled module")
    try:
        if zipfile.is_zipfile(path):
            module, places = _open_archive(path, allowed_classes)
        else:
            module, places = _open_stream(path, allowed_classes)
        stored = _stored_tensors(module)
        for name, tensor in stored.items():
            _check_place(name, tensor, places)
    except _DAMAGE as error:
        raise ValueError(f"{path} is refused: {error or type(error).__name__}") from error

    def read() -> dict[str, Tensor]:
        try:
            return {
                name: torch.frombuffer(bytearray(places[tensor.key].read()), dtype=torch.float32)[
                    tensor.offset : tensor.offset + _numel(tensor.shape)
                ]
                .clone()
                .view(tensor.shape)
                for name, tensor in stored.items()
            }
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is damaged: {error or type(error).__name__}; download it again"
            ) from error

    return module, read


@dataclass(frozen=True)
class _Place:
    """The bytes of a storage in the file."""

    num_bytes: int
    read: Callable[[], bytes]


def _open_archive(
    path: Path, allowed_classes: frozenset[str]
) -> tuple[PickledModule, dict[str, _Place]]:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"the archive has {len(pickles)} data.pkl, torch.save writes one")
        folder = pickles[0].removesuffix("data.pkl")
        if compressed := [n for n, i in members.items() if i.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"{compressed[0]} is compressed, torch.save compresses nothing")
        if members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl is longer than {_MAX_PICKLE_BYTES} bytes")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        module = _run(io.BytesIO(archive.read(pickles[0])), allowed_classes)

    def member_reader(name: str) -> Callable[[], bytes]:
        def read() -> bytes:
            with zipfile.ZipFile(path) as archive:
                return archive.read(name)  # verifies the member's CRC-32

        return read

    places = {
        name.removeprefix(f"{folder}data/"): _Place(info.file_size, member_reader(name))
        for name, info in members.items()
        if name.startswith(f"{folder}data/")
    }
    return _as_module(module), places


def _open_stream(
    path: Path, allowed_classes: frozenset[str]
) -> tuple[PickledModule, dict[str, _Place]]:
    num_bytes = path.stat().st_size
    with open(path, "rb") as file:
        # From memory: asked for 2^60 bytes, a file would try to allocate them.
        stream = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
        if _run(stream, allowed_classes) != _MAGIC or _run(stream, allowed_classes) != _PROTOCOL:
            raise ValueError("it is neither layout of torch.save")
        system = _run(stream, allowed_classes)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("its numbers are big-endian")
        module = _run(stream, allowed_classes)
        keys = _run(stream, allowed_classes)
        places = {}
        file.seek(stream.tell())
        for key in keys if isinstance(keys, list) else []:
            size = int.from_bytes(file.read(8), "little") * _ITEM_BYTES
            start = file.tell()
            if start + size > num_bytes:
                raise ValueError(f"storage {key!r} ends behind the end of the file: it is cut off")
            places[str(key)] = _Place(size, _slice_reader(path, start, size))
            file.seek(start + size)
    return _as_module(module), places


def _slice_reader(path: Path, start: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with open(path, "rb") as stream:
            stream.seek(start)
            return stream.read(size)

    return read


def _stored_tensors(module: PickledModule) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for number, (prefix, child) in enumerate(module.modules()):
        if number >= _MAX_MODULES:
            raise ValueError(f"it holds more than {_MAX_MODULES} modules")
        for name, tensor in child.tensors.items():
            tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return tensors


def _check_place(name: str, tensor: StoredTensor, places: Mapping[str, _Place]) -> None:
    if tensor.key not in places:
        raise ValueError(f"the storage {tensor.key!r} of {name} is missing")
    if places[tensor.key].num_bytes != tensor.size * _ITEM_BYTES:
        raise ValueError(
            f"the storage of {name} has {places[tensor.key].num_bytes} bytes where "
            f"{tensor.size} fp32 numbers belong"
        )
    if tensor.offset + _numel(tensor.shape) > tensor.size:
        raise ValueError(f"{name} {tensor.shape} reaches past its storage of {tensor.size} numbers")


def _run(stream: io.BytesIO, allowed_classes: frozenset[str]) -> Any:
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
        raise ValueError(f"its pickle refers to something outside it: {_brief(identity)}")

    def _new(self, name: Any, arguments: Any) -> PickledModule:
        if not isinstance(name, _Name) or name.name not in self.allowed_classes or arguments != ():
            raise ValueError(f"its pickle makes an object of {_brief(name)}")
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
        raise ValueError(f"its pickle calls {_brief(name)} with {_brief(arguments)}")

    def _build(self, state: Any) -> None:
        module = self.stack[-1]
        if not isinstance(module, PickledModule) or not isinstance(state, dict):
            raise ValueError(f"its pickle sets the state of {_brief(module)}")
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
        raise ValueError(f"a tensor has the shape {_brief(shape)} at {_brief(offset)}")
    contiguous = [_numel(shape[axis + 1 :]) for axis in range(len(shape))]
    differs = len(shape) != len(strides) or any(
        stride != expected and size > 1
        for stride, expected, size in zip(strides, contiguous, shape, strict=True)
    )
    if differs:
        raise ValueError(f"a tensor {shape} has the strides {_brief(strides)}: it must be whole")
    return StoredTensor(storage.key, storage.size, offset, shape)


def _as_module(value: Any) -> PickledModule:
    if not isinstance(value, PickledModule):
        raise ValueError(f"it holds {_brief(value)} where a pickled module belongs")
    return value


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _brief(value: Any) -> str:
    """A value of the file for an error message; never walks into it."""
    if isinstance(value, _Name):
        return value.name
    if isinstance(value, int | float | str | bytes):
        return repr(value)[:80]
    return f"a {type(value).__name__}"
