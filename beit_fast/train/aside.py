"""Work beside training: evaluation, pictures, curves, loggers. It never takes training down.

What was trained is saved first. A failure is told and counted, and training goes on; with
`run.strict` it is raised.
"""

import contextlib
import logging
from collections.abc import Iterator

from beit_fast.errors import ToldElsewhere
from beit_fast.train.stop import Interrupted
from beit_fast.train.world import World

logger = logging.getLogger("beit_fast.train")


class Aside:
    """Runs work beside training. `failed` says what of it went wrong, in order."""

    def __init__(self, world: World, *, strict: bool) -> None:
        self._world, self._strict = world, strict
        self.failed: list[str] = []

    @contextlib.contextmanager
    def work(self, name: str, *, everywhere: bool = False) -> Iterator[None]:
        """Run the block; what it raises is told, and raised further only in a strict run.

        `everywhere`: the block runs on every rank, and if it fails on one, all of them know. A stop
        signal ends the block; whoever asks the stop flag next leaves.
        """
        error = None
        try:
            yield
        except Interrupted:
            pass
        except Exception as problem:
            error = problem
        failed = error is not None
        if everywhere:
            failed = bool(self._world.any_of(int(failed)))
        if not failed:
            return
        if self._strict:
            raise error or ToldElsewhere(f"{name} failed on another rank, and run.strict is true")
        why = f"{type(error).__name__}: {error}" if error is not None else "on another rank"
        self.failed.append(f"{name} ({why})")
        if error is not None:
            logger.warning("%s failed, and training goes on: %s", name, why)
