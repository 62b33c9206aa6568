"""SIGTERM and SIGINT end a run after the step.

The handler only notes the signal. The loop saves and raises `Interrupted`; longer work that can be
left at any point (evaluation, a probe) asks `heed_stop` between its parts. A second SIGINT ends the
process at once: the last checkpoint is whole, because checkpoints are renamed into place.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from beit_fast.train.progress import tick

if TYPE_CHECKING:
    from beit_fast.train.world import World

GOES_ON = "the same command goes on"
WRITER = "checkpoint"  # name of the thread that writes one


class Interrupted(Exception):
    """A signal ended the work; what was done is saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, signum: int, place: str, saved: str = GOES_ON) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {place}; {saved}")
        self.signum, self.exit_code = signum, 128 + signum


class StopFlag:
    """The first stop signal that came, or 0."""

    received = 0

    def _handle(self, signum: int, _frame: object) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signum

    def leave(self, world: "World", place: str, saved: str = GOES_ON) -> None:
        """Raise Interrupted on every rank if any had a signal; called on all of them."""
        if signum := world.any_of(self.received):
            raise Interrupted(signum, place, saved)


_current: list[StopFlag] = []  # the flag of the outermost block, while there is one


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Collect SIGTERM and SIGINT while the block runs; outside the main thread, do nothing.

    A block within a block has the same flag: a signal between two stages is heard by the next.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopFlag()
        return
    if _current:
        yield _current[0]
        return
    flag = StopFlag()
    before = {s: signal.signal(s, flag._handle) for s in (signal.SIGTERM, signal.SIGINT)}
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
