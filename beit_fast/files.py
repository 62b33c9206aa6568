"""Files are replaced whole, and their errors say which file, and what lies there in its place."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_HEAD_BYTES = 512
# Of a safetensors header: 40,000 tensors. The library takes 25 times as much, 5 s and 700 MiB.
MOST_HEADER_BYTES = 4 << 20


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """OSErrors inside have this path: a full disk, as a file system says it, names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # others have a message of ours
            error.filename = str(path)
            if error.filename2 is not None:
                del error.filename2  # with None, the text would have "-> None"
        raise


def drop(path: Path) -> None:
    """Remove a file left half written, if it can be: the error that left it is the one to tell."""
    with contextlib.suppress(OSError):
        path.unlink()


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write(file)` into a new file that takes the place of `path` when it is whole.

    Raises OSError, with the path, where it cannot be written; what was there is then as it was.
    """
    # By chance, not by process: in containers the next one has the same number, and finds what a
    # killed one left.
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with naming(path):
            with open(temporary, "x+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        drop(temporary)
        raise


def replace_text(path: Path, text: str) -> None:
    """`replace_file` by a text: of a link planted under this name the link goes, not its target."""
    replace_file(path, lambda file: file.write(text.encode()))


def new_file(path: Path) -> BinaryIO:
    """An open file in the place of whatever lies there: of a link the link goes, not its target.

    For what need not be on the disk before the next one is written; else `replace_file`.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return open(path, "xb")


def open_no_link(path: str | Path, flags: int) -> int:
    """A handle of a file that goes on from run to run, created by the umask, and never of what a
    link points at. Also an `opener` for `open`.

    Raises OSError for a link, which says what to do.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP or not os.path.islink(path):
            raise
        raise OSError(
            f"{path} is a link, and what it points at would be written to: remove it"
        ) from error


def flush_folder(folder: Path) -> None:
    """Force the names of a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_long_header(path: Path) -> None:
    """Raise ValueError for a safetensors file whose header claims more than one of weights has."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER_BYTES:
        raise ValueError(
            f"{path} is not a whole safetensors file (its header claims {size} bytes, and at most "
            f"{MOST_HEADER_BYTES} are read): copy or write it anew"
        )


def describe(error: Exception) -> str:
    """An error in one line: of a file its path as it is, and what is wrong."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def damage(error: Exception) -> str:
    """What a parser of a file's content stumbled over, in a line of bounded length."""
    said = " ".join(describe(error).split())
    said = said if isinstance(error, OSError) else f"{type(error).__name__}: {said}"
    return said if len(said) <= 200 else f"{said[:197]}..."


def is_archive(head: bytes) -> bool:
    """Whether a file of these first bytes, 512 or more, is to be unpacked: a tar, or compressed.

    Not of zip, as which torch.save writes.
    """
    packed = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd")
    return head.startswith(packed) or head[257:262] == b"ustar"


def refuse_other_kinds(path: Path, wanted: str) -> None:
    """Raise ValueError for what often comes in the place of `wanted`: by its first bytes.

    Raises OSError for a file that cannot be opened.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise ValueError(f"{path} is empty and not {wanted}: copy or download it anew")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise ValueError(
            f"{path} is a web page and not {wanted}: download the file itself; a page's address is "
            "that of its description, or of a log-in"
        )
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is git-lfs's note of a file and not {wanted}: `git lfs pull` fetches it"
        )
    if is_archive(head):
        raise ValueError(f"{path} is an archive and not {wanted}: unpack it first")
