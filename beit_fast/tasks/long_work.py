"""Verbs that go through many images once: their threads, and a bar that says how far they are."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from beit_fast.train.launch import read_launch

_LINE_EVERY = 60.0  # seconds, where the output is no terminal


def alone(verb: str) -> None:
    """Raise ValueError where torchrun started several processes."""
    if (size := read_launch().size) > 1:
        raise ValueError(
            f"torchrun started {size} processes, and {verb} runs in one, with --num_threads: start "
            "it without torchrun"
        )


def threads(given: int | None) -> int:
    """The number given, or that of the cores that this process may use."""
    return given or len(os.sched_getaffinity(0))


@contextmanager
def progress_bar(
    console: Console, verb: str, unit: str, total: int, *, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """A bar of so many units, of which some were done before; `tick(count)` moves it. Where nobody
    can see a bar, a line each minute."""
    columns = (
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    if console.is_terminal or console.quiet:
        with Progress(*columns, console=console, disable=console.quiet) as bar:
            task = bar.add_task(unit, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    now, start = done, time.monotonic()
    told = start

    def tick(count: int) -> None:
        nonlocal now, told
        now += count
        if (at := time.monotonic()) - told >= _LINE_EVERY:
            told, rate = at, (now - done) / (at - start)
            left = (total - now) / rate if rate else 0
            console.print(
                f"{verb}: {now} of {total} {unit}, {rate:.0f}/s, {left / 60:.0f} minutes left"
            )

    yield tick
