"""Two runs never share a folder: `.lock` in it, locked by the kernel, with who holds it.

The lock goes with its open handle, so that a process that was killed holds none. What stands in
the file is for people: `1234 on node7`. It is written over nothing that is no lock of ours.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from beit_fast.files import naming, open_no_link
from beit_fast.flags import flag

NAME = ".lock"
# What a file of ours holds: nothing yet, or who; earlier versions wrote the process alone.
_HELD = re.compile(rb"(\d{1,10}( on [\w.-]{1,255})?)?\s*")
_IN_USE = (errno.EAGAIN, errno.EACCES)
_MOST_BYTES = 512
logger = logging.getLogger("beit_fast.train")


@contextlib.contextmanager
def sole_user(folder: Path, named: str = "run.output") -> Iterator[BinaryIO]:
    """Hold the lock of an output folder, the open file that it gives: whoever has a duplicate of
    its handle holds it too.

    named: the setting that names the folder. Raises ValueError, with process and host, if another
    run has it, and for a `.lock` that is none of ours; OSError where it is a link or cannot be
    written. On a file system without locks it warns and goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    with naming(path):
        handle = open_no_link(path, os.O_RDWR | os.O_CREAT)
    with open(handle, "r+b", buffering=0) as file:
        with naming(path):
            _take(path, file, named)
        yield file


def _take(path: Path, file: BinaryIO, named: str) -> None:
    _check(path, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IN_USE:
            raise ValueError(
                f"{path.parent} is in use by process {_who(file) or 'unknown'}: give another "
                f"{flag(named)}, or end that run"
            ) from error
        logger.warning(
            "%s is on a file system without locks (%s): nothing keeps a second run out of it, so "
            "see to it that there is none",
            path.parent,
            error.strerror,
        )
    host = re.sub(r"[^A-Za-z0-9_.-]", "_", socket.gethostname())[:255]
    who = f"{os.getpid()} on {host}".encode()
    # In one piece, with what was there before covered: whoever is killed or reads meanwhile meets
    # a lock of ours.
    os.pwrite(file.fileno(), who.ljust(len(_content(file))), 0)
    file.truncate(len(who))


def _check(path: Path, file: BinaryIO) -> None:
    """Raise ValueError for what was put there by others: it would be written over."""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or not _HELD.fullmatch(_content(file)):
        raise ValueError(
            f"{path} is not the lock that a run leaves there: look at it, and remove it"
        )


def _who(file: BinaryIO) -> str:
    return _content(file).decode("ascii", "replace").strip()


def _content(file: BinaryIO) -> bytes:
    return os.pread(file.fileno(), _MOST_BYTES, 0)
