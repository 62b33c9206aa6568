"""What verbs in one process over many images share."""

import io
import os
import re

import pytest
from rich.console import Console

from beit_fast.tasks import long_work
from beit_fast.tasks.long_work import alone, progress_bar, threads


def test_a_thread_for_each_core_unless_told_otherwise():
    assert threads(None) == len(os.sched_getaffinity(0))
    assert threads(3) == 3


def test_several_processes_are_refused(monkeypatch):
    alone("check")
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun started 2 processes, and check runs in one"):
        alone("check")


def said(is_terminal, monkeypatch, *, done=0):
    times = iter(range(0, 10_000, 25))
    monkeypatch.setattr(long_work.time, "monotonic", lambda: next(times))
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=120)
    with progress_bar(console, "pack", "images", 100 + done, done=done) as tick:
        for _ in range(10):
            tick(10)
    return file.getvalue()


def test_where_nobody_sees_a_bar_there_is_a_line_each_minute(monkeypatch):
    # A tick each 25 s: the third is the first after a minute.
    lines = said(False, monkeypatch, done=50).splitlines()
    assert lines == [
        "pack: 80 of 150 images, 0/s, 3 minutes left",
        "pack: 110 of 150 images, 0/s, 2 minutes left",
        "pack: 140 of 150 images, 0/s, 0 minutes left",
    ]


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    monkeypatch.undo()
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with progress_bar(console, "check", "images", 100) as tick:
        tick(100)
    assert re.search(r"check.*100/100.*images", file.getvalue())
