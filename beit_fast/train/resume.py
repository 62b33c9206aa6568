"""From which checkpoint a run goes on, and what changed since (changes.py)."""

import logging
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit_fast.flags import flag
from beit_fast.train.changes import Change, changes, check_settings
from beit_fast.train.config import RunConfig
from beit_fast.train.images import Images
from beit_fast.train.log import METRICS
from beit_fast.train.state import (
    Checkpoint,
    CheckpointError,
    checkpoint_paths,
    load_newest,
    read_manifest,
)
from beit_fast.train.world import World

logger = logging.getLogger("beit_fast.train")

ABANDONED = "abandoned"


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from, the changes that hold from there, and the run's history.

    `history` is what the manifest keeps of all resumes that changed something, this one's last.
    """

    checkpoint: Checkpoint
    changes: list[Change]
    history: list[dict[str, Any]]

    @property
    def manifest(self) -> dict[str, Any]:
        return self.checkpoint.manifest


def find_resume(
    output: Path,
    run: RunConfig,
    settings: Mapping[str, Any],
    world: World,
    images: Images | None = None,
) -> Resume | None:
    """The checkpoint to go on from, or None for a run from the start. Called on every rank.

    images: the task's, whose digest is in `settings`. Raises CheckpointError as `check_resume` and
    `load_newest` do.
    """
    check_resume(output, run, settings, images=images)
    world.barrier()  # nobody reads what is about to be moved
    _go_back(output, run, settings, world)
    checkpoint = load_newest(output, fallback=run.fallback)
    if checkpoint is None:
        return None
    found = check_settings(
        checkpoint.path,
        checkpoint.manifest["settings"],
        settings,
        run.resume_with,
        images=images,
    )
    history = list(checkpoint.manifest.get("history", []))
    entry: dict[str, Any] = {}
    if found:
        entry["changed"] = {change.name: [change.was, change.now] for change in found}
    if run.resume_from is not None and not _went_back(history, run.resume_from):
        entry["back_to"] = run.resume_from
    if entry:
        history.append({"step": checkpoint.step, **entry})
    return Resume(checkpoint, found, history)


def check_resume(
    output: Path,
    run: RunConfig,
    settings: Mapping[str, Any],
    unknown: Collection[str] = (),
    images: Images | None = None,
) -> dict[str, Any] | None:
    """The manifest of the checkpoint that the run goes on from, None for one from the start.

    Nothing else is read. Settings in `unknown` are not compared. Raises CheckpointError where
    `find_resume` would refuse, and where `run.resume` or `run.resume_from` cannot be had.
    """
    paths = checkpoint_paths(output)
    if run.resume == "never" and paths:
        raise CheckpointError(
            f"{output} holds checkpoints and {flag('run.resume')} is never: give another "
            f"{flag('run.output')}, or delete that folder"
        )
    if not paths:
        if run.resume_from is not None:
            raise CheckpointError(
                f"{output} holds no checkpoint to go back to: leave out {flag('run.resume_from')}"
            )
        if run.resume == "must":
            raise CheckpointError(
                f"{output} holds no checkpoint and {flag('run.resume')} is must: give the "
                f"{flag('run.output')} of the run to go on with, or {flag('run.resume')} auto to "
                "start one"
            )
        return None
    path = _target(paths, run, settings)
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        if run.fallback:
            return None  # which one counts is known when they are read
        raise
    check_settings(path, manifest["settings"], settings, run.resume_with, unknown, images)
    return manifest


def _go_back(output: Path, run: RunConfig, settings: Mapping[str, Any], world: World) -> None:
    """Set aside the checkpoints after `run.resume_from`, unless that was done before."""
    error = ""
    if world.is_main and run.resume_from is not None:
        try:
            paths = checkpoint_paths(output)
            target = _target(paths, run, settings)
            later = paths[paths.index(target) + 1 :]
            _set_aside(output, later)
        except (CheckpointError, OSError) as problem:
            error = str(problem)
    if errors := list(filter(None, world.gather(error))):
        raise CheckpointError(errors[0])


def _target(paths: list[Path], run: RunConfig, settings: Mapping[str, Any]) -> Path:
    """Which of these checkpoints the run goes on from.

    The newest; with `run.resume_from` that step's, until a checkpoint exists that was made by going
    back there under the settings of now: the same command can be given again and again.
    """
    wanted, newest = run.resume_from, paths[-1]
    if wanted is None or _step(newest) == wanted:
        return newest
    manifest = read_manifest(newest)
    if _went_back(manifest.get("history", []), wanted) and not changes(
        manifest["settings"], settings
    ):
        return newest
    for path in paths:
        if _step(path) == wanted:
            return path
    steps = ", ".join(str(_step(path)) for path in paths)
    raise CheckpointError(
        f"{newest.parent} holds no checkpoint of step {wanted}: pass {flag('run.resume_from')} "
        f"with one of {steps} ({flag('run.keep')} says how many stay)"
    )


def _went_back(history: Iterable[Mapping[str, Any]], step: int) -> bool:
    return any(entry.get("back_to") == step for entry in history)


def _set_aside(output: Path, paths: Sequence[Path]) -> None:
    """Move checkpoints to checkpoints/abandoned, where none is read, with the metrics so far."""
    if not paths:
        return
    folder = paths[0].parent / ABANDONED
    folder.mkdir(exist_ok=True)
    for path in paths:
        if (folder / path.name).exists():
            shutil.rmtree(folder / path.name)
        path.rename(folder / path.name)
    if (metrics := output / METRICS).exists():
        shutil.copy(metrics, folder / METRICS)
    logger.warning(
        "%s set aside in %s: delete that folder when nothing in it is wanted",
        ", ".join(path.name for path in paths),
        folder,
    )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
