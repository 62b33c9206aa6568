"""The tensors of a module that was pickled whole, read without running anything of the file.

`torch.save(module)` writes a program for a stack machine that names classes and functions to call.
Loading it means trusting it. Here `pickle_machine` follows it and runs nothing: the file decides
only which of its bytes are which tensor.

Both layouts are read: the zip archive (torch >= 1.6) with its checksums, and the plain stream of
earlier versions, which `torch.load(weights_only=True)` refuses for modules even with an allow list.

Source    torch/serialization.py, `_save` and `_legacy_save`
"""

import io
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_fast.files import refuse_other_kinds
from beit_fast.tokenizer.pickle_machine import PickledModule, StoredTensor, brief, run_pickle

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # first two pickles of the stream layout
_MAX_PICKLE_BYTES = 2**24  # of the part without weights; DALL-E's takes 30 kB
_MAX_MODULES = 10_000
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
                    tensor.offset : tensor.offset + math.prod(tensor.shape)
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
        module = run_pickle(io.BytesIO(archive.read(pickles[0])), allowed_classes)

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
        if (
            run_pickle(stream, allowed_classes) != _MAGIC
            or run_pickle(stream, allowed_classes) != _PROTOCOL
        ):
            raise ValueError("it is neither layout of torch.save")
        system = run_pickle(stream, allowed_classes)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("its numbers are big-endian")
        module = run_pickle(stream, allowed_classes)
        keys = run_pickle(stream, allowed_classes)
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
    if tensor.offset + math.prod(tensor.shape) > tensor.size:
        raise ValueError(f"{name} {tensor.shape} reaches past its storage of {tensor.size} numbers")


def _as_module(value: Any) -> PickledModule:
    if not isinstance(value, PickledModule):
        raise ValueError(f"it holds {brief(value)} where a pickled module belongs")
    return value
