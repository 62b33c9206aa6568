"""How a run of one or many ranks begins: the world, what all have alike, the folder they share."""

import contextlib
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from beit_fast.errors import RunError
from beit_fast.files import drop
from beit_fast.flags import flag
from beit_fast.train.agreement import code_digest, settings_of_all
from beit_fast.train.requeue import requeued
from beit_fast.train.state import versions
from beit_fast.train.world import World, open_world

# What kernels warn of as they leave the work to torch: a device that they are not for, or a kernel
# that does not compile.
FALLS_BACK = r"\w+ runs on \w+, slower"
VISIBLE = 10.0  # seconds after which a file must be seen on another node


@contextlib.contextmanager
def open_run(config: Any, output: str, *, named: str = "run.output") -> Iterator[World]:
    """The world of a run whose settings are `config.run` among others, once its ranks agree.

    output: the folder that all of them write to or read from; named: its setting. Raises as
    `open_world` and `requeued` do, ValueError for ranks that differ or do not see the folder, and
    RunError where a kernel falls back inside and `config.run.strict` is true.
    """
    run = config.run
    with (
        requeued(run),
        _strict(run.strict),
        open_world(
            run.device,
            run.cpu_threads,
            timeout=run.timeout,
            startup_timeout=run.startup_timeout,
        ) as world,
    ):
        if world.size > 1:
            check_alike(config, world)
            check_shared(Path(output), world, named)
            world.watch.folder = Path(output)  # of the whole run
        yield world


@contextlib.contextmanager
def _strict(strict: bool) -> Iterator[None]:
    """Inside, where it is, a kernel that gives way to something slower ends the run."""
    with warnings.catch_warnings():
        if strict:
            warnings.filterwarnings("error", message=FALLS_BACK)
        try:
            yield
        except UserWarning as error:
            if not (strict and re.match(FALLS_BACK, str(error))):
                raise
            raise RunError(f"{error}. {flag('run.strict')} false goes on like that") from error


def check_alike(config: Any, world: World) -> None:
    """Raise ValueError unless every rank has the same code, versions and settings."""
    of = {"version of beit_fast": versions()["beit-fast"], "version of torch": torch.__version__}
    world.agree(of | {"code": code_digest()} | settings_of_all(config))


def check_shared(folder: Path, world: World, named: str) -> None:
    """Raise ValueError unless every rank sees in `folder` what rank 0 writes there, OSError where
    rank 0 cannot write."""
    file, problem = folder / f".ranks_{os.urandom(4).hex()}", None
    try:
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            file.touch(exist_ok=False)
    except OSError as error:
        problem = f"nothing can be written to {folder} ({error.strerror or error})"
    try:
        (name, first, problem), *_ = world.gather((file.name, str(folder), problem))
        if problem:
            raise OSError(f"{problem}: give another {flag(named)}")
        until = time.monotonic() + VISIBLE
        while not (seen := (folder / name).exists()) and time.monotonic() < until:
            time.sleep(0.1)  # a file system of many machines takes its time
        blind = [(r, f) for r, (f, s) in enumerate(world.gather((str(folder), seen))) if not s]
    finally:
        if world.is_main:
            drop(file)
    if blind:
        which = ", ".join(f"rank {rank} in {theirs}" for rank, theirs in blind[:5])
        raise ValueError(
            f"rank 0 writes to {first}, and what it wrote there is not found by {which}: every "
            f"rank has to see the same folder, so give all the same {flag(named)} on a disk that "
            "all nodes share"
        )
