"""Errors of several ranks are said once.

What all ranks meet alike is said by the first of them, what one rank meets by that one, with its
name, and whoever only met the consequence (a collective that broke because another rank failed)
says nothing. The board decides; it is asked while the launcher already ends the others.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from beit_fast.errors import RunError, ToldElsewhere
from beit_fast.train.launch import error_file, has_agent_store, launched_rank

if TYPE_CHECKING:
    from beit_fast.train.board import Board

ELSEWHERE = "ended because the run could not go on: another rank says why"
SPEAKING = 0.3  # seconds that saying it takes
ALIKE = 1.0  # seconds in which ranks that fail alike have failed
# Of torch's errors where a peer is gone, the ones that have no type of their own.
BROKEN = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|[Bb]roken pipe|Timed out waiting|Application time"
    r"out caused pair closure|Read error|Socket|socket|Rank \d+ is not ready"
)


class RankLost(RunError):
    """Other ranks are gone without a word."""


_board: "Board | None" = None
_board_of_threads: "Board | None" = None  # the main thread may hang in the other


def speaks_through(board: "Board | None") -> None:
    """From now on this board is asked; it may be one whose world is closed."""
    global _board, _board_of_threads
    _board, _board_of_threads = board, board and board.clone()


def broke(error: BaseException) -> bool:
    """Whether a collective failed for no fault of this rank."""
    if isinstance(error, RunError) or not isinstance(error, RuntimeError):
        return False
    of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    return of_torch or BROKEN.search(str(error)) is not None


def text_of(error: BaseException) -> str:
    """What ranks compare to know whether they failed alike."""
    return str(error) or type(error).__name__


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Until the block ends SIGTERM is not heard: the launcher sends it as soon as one rank ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def leave_to_us() -> None:
    """From now on this process ends by itself: see `deaf`, of which this is the lasting kind."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_with(message: str) -> NoReturn:
    """From a thread: one rank says `message`, and this process ends without its main thread."""
    message, board = f"beit-fast: {message}", _board_of_threads
    speaks = True  # where nobody can be asked

    def ask() -> None:
        nonlocal speaks
        with contextlib.suppress(RuntimeError):
            board.write("failure", {"text": message, "broken": False})
            speaks = board.claim("still")

    if board is not None:
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(SPEAKING)
    if speaks:
        _record(message)
        _print(message)
    else:
        _record(ELSEWHERE, late=True)
        time.sleep(SPEAKING)  # the launcher ends the others as soon as one has ended
    sys.stdout.flush()
    os._exit(1)


def say_once(message: str, error: BaseException | None = None) -> None:
    """Print `message`, the last of this process, on stderr of one of the ranks that have it.

    error: what it says, None for wrong arguments. Of ToldElsewhere nothing is printed.
    """
    launch = launched_rank()
    if launch.size == 1:
        _print(message)
        return
    with deaf():
        if isinstance(error, ToldElsewhere):
            _record(ELSEWHERE, late=True)
            return
        _record(message)
        try:
            speaks, alone = _turn(message if error is None else text_of(error), error)
        except RuntimeError:  # the store is gone: nobody can be asked
            speaks, alone = True, True
        if speaks:
            _print(with_rank(message, launch.says_who) if alone else message)


def with_rank(message: str, who: str) -> str:
    """The message with the rank behind the command's name; a traceback with it in front."""
    name = "beit-fast: "
    if message.startswith(name):
        return f"{name}{who}{message.removeprefix(name)}"
    return f"{name}{who}a fault of the program\n{message}"


def _turn(text: str, error: BaseException | None) -> tuple[bool, bool]:
    """Whether this rank speaks, and whether it alone has this error."""
    launch = launched_rank()
    key = "lost" if isinstance(error, RankLost) else hashlib.sha256(text.encode()).hexdigest()
    if _board is None:  # before there was a world
        from beit_fast.train.board import agent_store, claim

        store = agent_store() if has_agent_store() else None
        if store is None:
            return True, launch.rank != 0
        return claim(store, key, launch.rank), False
    if not _board.claim(key):
        return False, False
    return True, not isinstance(error, RankLost) and not _alike(_board, text)


def _alike(board: "Board", text: str) -> bool:
    """Whether all ranks fail like this one."""
    until = time.monotonic() + ALIKE
    while True:
        failures = board.read("failure")
        if all(failures):
            return all(failure["text"] == text for failure in failures)
        if any(failure and failure["text"] != text for failure in failures):
            return False
        if time.monotonic() > until:
            return False
        time.sleep(0.05)


def _record(message: str, *, late: bool = False) -> None:
    """For the launcher's table, which takes the earliest for the cause. late: it is none."""
    if (path := error_file()) is None:
        return
    seconds = int(time.time()) + (2 if late else 0)
    said = {"py_callstack": message, "timestamp": str(seconds)}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": said}}, file)


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
