"""What this process is at: noted by the main thread, read by the watch (watch.py).

A note costs some attributes. Code that no `World` reaches notes as well: there is one per process,
as there is one signal handler.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Note:
    """Where the main thread is, and how often it said so."""

    place: str = "starting"  # "rank 1 is ...", as a message has it
    step: int | None = None  # of training, from 1
    order: int = 0  # of the place within the step: the same on every rank
    waits: bool = False  # for the other ranks
    unhurried: bool = False  # at work that may take as long as the start
    started: bool = False  # the first step is done: what compiles is compiled
    ticks: int = 0


note = Note()


def progress(place: str, step: int | None = None, *, waits: bool = False) -> None:
    """This process is at `place` now. step: the one that begins; the one before is over."""
    if step is not None and step != note.step:
        note.started = note.started or note.step is not None
        note.step, note.order = step, 0
    note.place, note.waits = place, waits
    note.order += 1
    note.ticks += 1


def tick() -> None:
    """A part more of the work is done, in a loop of many."""
    note.ticks += 1


def begin_stage(place: str) -> None:
    """What follows has a first step of its own, which compiles."""
    note.place, note.step, note.order, note.waits, note.started = place, None, 0, False, False
    note.ticks += 1


@contextlib.contextmanager
def unhurried(place: str) -> Iterator[None]:
    """Work without parts that may take long: writing a checkpoint, drawing a picture."""
    before = note.place, note.unhurried
    note.place, note.unhurried = place, True
    note.ticks += 1
    try:
        yield
    finally:
        note.place, note.unhurried = before
        note.ticks += 1


@contextlib.contextmanager
def waiting_for_ranks() -> Iterator[None]:
    """Around whatever ends when all ranks have come."""
    before, note.waits = note.waits, True
    try:
        yield
    finally:
        note.waits = before
        note.ticks += 1
