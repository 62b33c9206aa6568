"""SIGTERM, SIGINT and SIGUSR1 end a run after the step.

The handler notes the signal, and ends a wait for what is read (`StopFlag.until_told`), which may
never come. The loop saves and raises `Interrupted`; longer work that can be left at any point
(evaluation, a probe) asks `heed_stop` between its parts. A second SIGINT ends the process at once:
the last checkpoint is whole, because checkpoints are renamed into place.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from beit_fast.train.progress import tick

if TYPE_CHECKING:
    from beit_fast.train.world import World

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GOES_ON = "the same command goes on"
WRITER = "checkpoint"  # name of the thread that writes one

T = TypeVar("T")


class Interrupted(Exception):
    """A signal ended the work; what was done is saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, signum: int, place: str, saved: str = GOES_ON) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {place}; {saved}")
        self.signum, self.exit_code = signum, 128 + signum


class _Told(BaseException):
    """A stop signal came in a wait. No Exception: a reader that bears those does not hold it."""


class StopFlag:
    """The first stop signal that came, or 0."""

    received = 0
    _waits = False

    def _handle(self, signum: int, _frame: object) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signum
        if self._waits:
            self._waits = False  # once: what it passes through may clean up
            raise _Told

    def until_told(self, values: Iterator[T]) -> Iterator[T]:
        """The values until a stop signal comes, which ends the wait for one. Closes `values`."""
        try:
            while (got := self._next(values)) is not None:
                yield from got
        finally:
            if hasattr(values, "close"):
                values.close()

    def _next(self, values: Iterator[T]) -> list[T] | None:
        """A list of the next; None at their end, and where a signal came before it or meanwhile."""
        try:
            return self._wait_for(values)
        except _Told:  # a call around all of it: no instruction of it is outside
            return None

    def _wait_for(self, values: Iterator[T]) -> list[T] | None:
        try:
            self._waits = True
            # Asked after that: a signal between the two would be noted, and nothing more.
            return None if self.received else [next(values)]
        except StopIteration:
            return None
        finally:
            self._waits = False

    def leave(self, world: "World", place: str, saved: str = GOES_ON) -> None:
        """Raise Interrupted on every rank if any had a signal; called on all of them."""
        if signum := world.any_of(self.received):
            raise Interrupted(signum, place, saved)


_current: list[StopFlag] = []  # the flag of the outermost block, while there is one


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Collect stop signals while the block runs; outside the main thread, do nothing.

    A block within a block has the same flag: a signal between two stages is heard by the next.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopFlag()
        return
    if _current:
        yield _current[0]
        return
    flag = StopFlag()
    before = {s: signal.signal(s, flag._handle) for s in STOPS}
    _current.append(flag)
    try:
        yield flag
    finally:
        _current.clear()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def heed_stop(place: str) -> None:
    """Raise Interrupted if a stop signal came: for work that may be left here.

    `place` is where, as a message has it: "while evaluating". On this rank alone: whoever calls it
    among several sees to it that the others leave too.
    """
    tick()
    if _current and _current[0].received:
        raise Interrupted(_current[0].received, place)


def heeded(values: Iterator[T], place: str) -> Iterator[T]:
    """The values, one a part of the work: raises Interrupted as `heed_stop` does, also where the
    signal comes in the wait for one. Closes `values`."""
    with contextlib.closing((_current[0] if _current else StopFlag()).until_told(values)) as told:
        for value in told:
            heed_stop(place)
            yield value
        heed_stop(place)


@contextlib.contextmanager
def left_together(world: "World", place: str) -> Iterator[None]:
    """Work of every rank that one may leave at a stop signal, by `heed_stop` or `heeded`: at its
    end Interrupted is raised on all of them."""
    told = 0
    try:
        yield
    except Interrupted as stop:
        told = stop.signum
    if signum := world.any_of(told):
        raise Interrupted(signum, place)
