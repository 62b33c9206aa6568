"""A thread beside the run: what stands still is ended, with who and where.

Each rank tells the others through the board, every BEAT, where its main thread is and how long it
may still be silent (progress.py). When nobody has moved for the time-out, one rank says who is
behind, each writes the stacks of its threads to a file, and all end. A rank whose thread cannot run
(an extension holds Python's lock) is ended by faulthandler's timer, which needs no Python.
"""

import contextlib
import faulthandler
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from beit_fast.files import new_file
from beit_fast.train.agreement import names
from beit_fast.train.board import Board
from beit_fast.train.progress import Note, note, tick

BEAT = 0.5  # seconds between what a rank tells
SILENT = 1.7  # a rank that tells nothing for so long has no thread that runs
LONGEST_BEAT = 2 * BEAT  # more is not time that this process had: it was stopped, or had no core
LEAVING = 15.0  # seconds between an error and the end of its process
AFTER = 3 * BEAT  # what faulthandler's timer waits on top of the time-out

logger = logging.getLogger("beit_fast.train")


@dataclass(frozen=True)
class Seen:
    """What is known of a rank. left: seconds that it may still be silent; gone: it has left."""

    place: str
    step: int | None
    order: int
    waits: bool
    left: float
    alive: bool = True
    gone: bool = False

    def words(self, step: int | None = None, *, many: bool = False) -> str:
        """Where it is, or they are, with the step where that is not `step`."""
        where = self.place if self.step in (None, step) else f"{self.place} of step {self.step}"
        if self.gone:
            return "have ended" if many else "has ended"
        if not self.alive:
            gives, it = ("give", "they are") if many else ("gives", "it is")
            return f"{gives} no sign any more, last seen {where}: {it} dead, cut off, or stuck"
        return f"{'are' if many else 'is'} {where}"


def standing_still(ranks: Mapping[int, Seen], timeout: float) -> tuple[str, list[int]]:
    """One line that says who keeps whom waiting for `timeout` seconds, and the ranks to blame."""
    blamed = _behind(ranks)
    told = [seen for seen in ranks.values() if seen.step is not None]
    told = [seen for seen in told if seen.alive and not seen.gone] or told
    step = min((seen.step for seen in told), default=None)
    where = f" at step {step}" if step is not None else ""
    alike: dict[str, list[int]] = {}
    for rank in blamed:
        alike.setdefault(ranks[rank].words(step), []).append(rank)
    who = ", ".join(
        f"{names(them)} {ranks[them[0]].words(step, many=len(them) > 1)}" for them in alike.values()
    )
    rest = [rank for rank in ranks if rank not in blamed]
    them = "it" if len(blamed) == 1 else "them"
    wait = f" waits for {them}" if len(rest) == 1 else f" wait for {them}"
    wait = f", and {names(rest)}{wait}" if rest else ""
    return f"no progress for {timeout:g} s{where}: {who}{wait}", blamed


def _behind(ranks: Mapping[int, Seen]) -> list[int]:
    """The ranks that the others wait for: gone or silent, else those at work of their own, else
    those that have come least far."""
    if found := [r for r, seen in ranks.items() if seen.gone or not seen.alive]:
        return found
    if found := [r for r, seen in ranks.items() if not seen.waits]:
        return found
    come = {r: (seen.step or 0, seen.order) for r, seen in ranks.items()}
    return [r for r in ranks if come[r] == min(come.values())]


class Clock:
    """Seconds that the main thread has not moved, of those that this process could run in."""

    def __init__(self, of: Note, timeout: float, startup_timeout: float) -> None:
        self._of, self._ticks, self._last = of, -1, time.monotonic()
        self._timeout, self._startup = timeout, startup_timeout
        self.still = 0.0

    def read(self) -> float:
        now = time.monotonic()
        passed, self._last = min(now - self._last, LONGEST_BEAT), now
        self.still = 0.0 if self._of.ticks != self._ticks else self.still + passed
        self._ticks = self._of.ticks
        return self.still

    @property
    def limit(self) -> float:
        return self._startup if self._of.unhurried or not self._of.started else self._timeout


class Ranks:
    """The other ranks as the board shows them, read by a thread of its own: a store whose machine
    is gone may not answer for long."""

    def __init__(self, board: Board) -> None:
        self._board, self._beat = board, 0
        self._beats: dict[int, int] = {}
        self._changed: dict[int, float] = {}
        self.seen: dict[int, Seen] = {}
        self.since: float | None = None  # when looking began
        self.answered = time.monotonic()

    def tell(self, mine: Seen) -> None:
        """Raises RuntimeError where the store does not answer."""
        self._beat += 1
        self._board.write("note", asdict(mine) | {"beat": self._beat})
        self.answered = time.monotonic()

    def look(self) -> None:
        """Raises RuntimeError where the store does not answer."""
        now = time.monotonic()
        found = self._board.read("note")
        if self.since is None:
            self.since = now
        seen = {}
        for rank, value in enumerate(found):
            value = value or asdict(Seen("starting", None, 0, False, 0.0)) | {"beat": 0}
            beat = value.pop("beat")
            if beat != self._beats.get(rank):
                self._beats[rank], self._changed[rank] = beat, now
            alive = now - self._changed[rank] < SILENT
            seen[rank] = Seen(**value | {"alive": alive})
        self.seen, self.answered = seen, time.monotonic()

    def forget(self) -> None:
        """No longer looking: what was seen is old."""
        self.since, self.seen = None, {}
        self._beats, self._changed = {}, {}

    @property
    def known(self) -> bool:
        """Whether looking has lasted long enough to tell who is silent."""
        return (
            self.since is not None and bool(self.seen) and (time.monotonic() - self.since > SILENT)
        )


class Watch:
    """Ends this process when the run stands still. board: None of a process alone.

    named, startup_named: the flags of the time-outs. folder: where stacks go, a temporary one until
    it is set. end: what ends the process, given the message for whoever speaks.
    """

    def __init__(
        self,
        board: Board | None,
        rank: int,
        *,
        timeout: float,
        startup_timeout: float,
        advice: str,
        end: Callable[[str], None],
    ) -> None:
        self.folder = Path(tempfile.gettempdir())
        # Other ranks wait for this one all the time. Alone, only training is known to make steps.
        self.armed = board is not None
        self._board, self._rank, self._advice, self._end = board, rank, advice, end
        self._clock = Clock(note, timeout, startup_timeout)
        self._others = Ranks(board.clone()) if board is not None else None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._mine = Seen("starting", None, 0, False, startup_timeout)
        self._looking = self._asked = False
        self._leaving: tuple[str, float] | None = None

    def start(self) -> None:
        works = [self._watch] if self._others is None else [self._watch, self._exchange]
        for work in works:
            thread = threading.Thread(target=work, name=f"beit_fast {work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Raises nothing; the other ranks learn that this one has left."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * BEAT)
        if self._others is not None:
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(RuntimeError):
                self._others.tell(Seen("leaving", note.step, note.order, False, 0.0, gone=True))

    def leave(self, message: str) -> None:
        """The main thread is about to end with this message, and has LEAVING seconds for it."""
        self._leaving = message, time.monotonic() + LEAVING

    def lost(self) -> dict[int, Seen]:
        """Ranks that are gone or give no sign, as far as is known by now; ask again. For a
        collective that broke."""
        self._asked = True
        others = self._others
        if others is None or not others.known:
            return {}
        seen = dict(others.seen)
        return {r: s for r, s in seen.items() if r != self._rank and (s.gone or not s.alive)}

    def _watch(self) -> None:
        while not self._stop.wait(BEAT / 2):
            if self._leaving is not None:
                message, until = self._leaving
                if self._others is not None:
                    faulthandler.dump_traceback_later(LEAVING + AFTER, exit=True)
                if time.monotonic() > until:
                    self._end(message)
                continue
            if not self.armed:
                tick()
            still, limit = self._clock.read(), self._clock.limit
            left = limit - still
            self._mine = Seen(note.place, note.step, note.order, note.waits, left)
            self._looking = left < 2 * SILENT and still > BEAT
            if self._others is not None:
                faulthandler.dump_traceback_later(max(left, 0) + AFTER, exit=True)
            if left <= 0 and (ranks := self._all_still()) is not None:
                self._fire(ranks, limit)

    def _all_still(self) -> dict[int, Seen] | None:
        """All ranks, where none of them moves any more; None: wait on."""
        if self._others is None:
            return {self._rank: self._mine}
        if time.monotonic() - self._others.answered > 2 * SILENT:
            return {self._rank: self._mine}  # the store's host is gone
        if not self._others.known:
            return None
        ranks = self._others.seen | {self._rank: self._mine}
        moving = [s for s in ranks.values() if s.alive and not s.gone and s.left > BEAT]
        return None if moving else ranks

    def _exchange(self) -> None:
        while not self._stop.wait(BEAT / 2):
            with contextlib.suppress(RuntimeError):  # as if it had not answered
                self._others.tell(self._mine)
                if self._looking or self._asked:
                    self._others.look()
                else:
                    self._others.forget()

    def _fire(self, ranks: Mapping[int, Seen], limit: float) -> None:
        faulthandler.dump_traceback_later(AFTER, exit=True)  # if a file or pipe hangs, too
        said, blamed = standing_still(ranks, limit)
        if self._board is None:
            said = said.replace("rank 0", "this process")
        stacks = self.folder / f"stacks_rank{self._rank}.txt"
        self._dump(stacks)
        if self._board is not None and len(ranks) < self._board.size:
            said += f"; the store at {self._board.address} does not answer"
        shown = ", ".join(
            str(self.folder / f"stacks_rank{r}.txt") for r in blamed if _can(ranks, r)
        )
        said += f". Stacks: {shown or stacks}. {self._advice}"
        self._end(said)

    def _dump(self, path: Path) -> None:
        """The stacks of all threads, in a file; by a thread, for its disk may be what hangs."""

        def write() -> None:
            with contextlib.suppress(OSError), new_file(path) as file:
                faulthandler.dump_traceback(file=file, all_threads=True)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(BEAT)


def _can(ranks: Mapping[int, Seen], rank: int) -> bool:
    return ranks[rank].alive and not ranks[rank].gone
