"""A safetensors file of ours says in its metadata which bytes it was saved with.

    beit_fast.seal     "1": how the digest is made
    beit_fast.sha256   of the other metadata and, by name, every tensor's dtype, shape and bytes

A flipped bit in a weight otherwise loads as another number without any error. Two keys, so that a
flip in the name of one does not make it a file without. Files of others and of earlier versions
have neither, and are read as they are.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from beit_fast.files import damage, replace_file

KIND_KEY, DIGEST_KEY = "beit_fast.seal", "beit_fast.sha256"
KIND = "1"
# Metadata that keep the place of the seal in a file until `seal` knows it.
UNSEALED = {KIND_KEY: KIND, DIGEST_KEY: "0" * 64}
_METADATA = "__metadata__"
_CHUNK = 1 << 20
# Of the tensor of a name, which lies there in the file's data: its bytes, in parts.
TensorBytes = Callable[[str, int, int], Iterable[Any]]


def replace_safetensors(path: Path, content: bytes) -> None:
    """`replace_file` by the bytes of a safetensors file with UNSEALED metadata, which is sealed."""
    data = memoryview(content)[_start_of(content) :]

    def write(file: BinaryIO) -> None:
        file.write(content)
        file.seek(0)
        seal(file, lambda _, start, end: [data[start:end]])

    replace_file(path, write)


def seal(file: BinaryIO, tensor_bytes: TensorBytes) -> bytes:
    """Put the digest of what is in memory into a safetensors file with UNSEALED metadata. Returns
    the file's bytes before its tensors.

    file: open for reading and writing, at its beginning. The metadata are sorted too: the library
    writes them in an order of chance, and the same weights are to be the same bytes.
    """
    length = file.read(8)
    size = _start_of(length) - 8
    header = json.loads(file.read(size))
    metadata = header[_METADATA]
    assert metadata.keys() >= UNSEALED.keys()
    metadata[DIGEST_KEY] = _digest(header, tensor_bytes)
    header[_METADATA] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= size
    head = length + text.ljust(size)  # a header ends with spaces
    file.seek(0)
    file.write(head)
    return head


def check_seal(path: Path) -> None:
    """Raise ValueError, which names the file, where it is not what its seal says.

    A file that has no seal, or that is no safetensors file, is left to whoever reads it.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = _start_of(file.read(8))
        if not 8 < start <= size:
            return
        text = file.read(start - 8)
        if not any(key.encode() in text for key in UNSEALED):
            return
        try:
            header = json.loads(text, object_pairs_hook=_once_each)
            said = {key: header[_METADATA].get(key) for key in UNSEALED}
            _check_places(header, size - start)
            found = _digest(header, lambda _, begin, end: _parts(file, start + begin, end - begin))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({damage(error)}): copy or write it anew"
            ) from error
    if None in said.values():
        (left,) = (key for key, value in said.items() if value is not None)
        raise ValueError(
            f"{path} is damaged: of the two keys of its seal only {left} is left: copy or write it "
            "anew"
        )
    if said[KIND_KEY] != KIND:
        raise ValueError(
            f"{path} has a seal of kind {said[KIND_KEY]!r}, this version checks {KIND!r}: it is "
            "damaged, or of a newer beit_fast, which reads it"
        )
    if found != said[DIGEST_KEY]:
        raise ValueError(
            f"{path} is damaged: its content has the SHA-256 {found[:12]}... and was saved with "
            f"{str(said[DIGEST_KEY])[:12]}...: copy or write it anew. If it was changed on "
            f"purpose, save it without {KIND_KEY} and {DIGEST_KEY} in its metadata"
        )


def _digest(header: dict[str, Any], tensor_bytes: TensorBytes) -> str:
    """Where in the file a tensor lies does not count: other tools may write it in another order."""
    said = {key: text for key, text in header[_METADATA].items() if key != DIGEST_KEY}
    digest = hashlib.sha256(_canonical(said))
    for name in sorted(header.keys() - {_METADATA}):
        entry = header[name]
        digest.update(_canonical([name, entry["dtype"], entry["shape"]]))
        for part in tensor_bytes(name, *entry["data_offsets"]):
            digest.update(part)
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _start_of(head: bytes) -> int:
    """Where the data begin, from a file's first bytes."""
    return 8 + int.from_bytes(head[:8], "little")


def _check_places(header: dict[str, Any], size: int) -> None:
    """Raise ValueError unless the tensors lie one behind the other and fill the data."""
    places = sorted(e["data_offsets"] for name, e in header.items() if name != _METADATA)
    end = 0
    for begin, after in places:
        if not (type(begin) is type(after) is int and begin == end <= after):
            raise ValueError("there are gaps between its tensors")
        end = after
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, and {size} are there")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def _parts(file: BinaryIO, start: int, size: int) -> Iterator[memoryview]:
    file.seek(start)
    buffer = memoryview(bytearray(min(size, _CHUNK)))
    while size and (read := file.readinto(buffer[: min(size, _CHUNK)])):
        yield buffer[:read]
        size -= read
