"""SIGTERM and SIGINT end a run after the step; two runs never share a folder.

The handler only notes the signal; the loop saves and raises `Interrupted`. A second SIGINT ends
the process at once: the last checkpoint is whole, because checkpoints are renamed into place.
"""

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from beit_fast.flags import flag


class Interrupted(Exception):
    """A signal ended the run after it was saved; `exit_code` is 128 + the signal's number."""

    def __init__(
        self, signum: int, step: int, unit: str = "step", saved: str = "the checkpoint is saved"
    ) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after {unit} {step}; {saved}")
        self.exit_code = 128 + signum


class StopFlag:
    """The first stop signal that came, or 0."""

    received = 0

    def _handle(self, signum: int, _frame: object) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signum


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Collect SIGTERM and SIGINT while the block runs; outside the main thread, do nothing."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {s: signal.signal(s, flag._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def sole_user(folder: Path, named: str = "run.output") -> Iterator[None]:
    """Hold the lock of an output folder. Raises ValueError, with the pid, if another run does.

    named: the setting that names the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by process {file.read().strip() or 'unknown'}: give another "
                f"{flag(named)}, or end that run"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield  # the lock goes with the file handle, also when the process is killed
