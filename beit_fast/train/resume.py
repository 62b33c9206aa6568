"""What may change when a run is resumed, and from which checkpoint it goes on.

    habit     free: learns the same, or the same but for rounding; not recorded
    advised   may change, for errors of ours advise it: said, and recorded in the manifest's history
    identity  refused, unless accepted by name with --run.resume_with

A setting that is neither a habit nor advised belongs to the run's identity. Names are those of the
manifest's settings, and of the flags.
"""

import logging
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from beit_fast.flags import flag
from beit_fast.train.agreement import flat
from beit_fast.train.config import RunConfig
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

HABITS = frozenset(
    {
        # places: what lies there is compared, by its weights, classes or number of images
        *("run.output", "data.path", "data.test", "data.follow_links", "init_key"),
        *("data.masks", "data.test_masks", "data.classes_file"),
        # pace and reports
        *("run.log_every", "run.save_every", "run.keep", "run.save_async"),
        *("run.failed_saves", "run.requeue"),
        *("run.picture_every", "run.evaluate_every", "run.strict", "data.num_threads"),
        *("data.read_timeout", "data.read_retries"),
        # how a resume is made
        *("run.resume", "run.resume_from", "run.resume_with", "run.fallback"),
        # other rounding, and on another device or compiled other random numbers
        *("run.device", "run.compile", "run.cuda_graph", "run.prepare_ahead", "run.cpu_threads"),
        *("run.parallel", "run.timeout", "run.startup_timeout"),
        *("optim.backend", "grad_checkpointing", "evaluation.windows_at_once"),
    }
)
# The same images in each step however they are split: advised as long as their product stays.
SPLIT = ("run.images_per_batch", "data.batch_size", "run.accumulate", "run.world_size")
ADVISED = frozenset(
    {
        *("optim.lr", "optim.min_lr", "optim.warmup_steps", "optim.warmup_epochs"),
        *("optim.decay_steps", "optim.weight_decay", "optim.weight_decay_end", "optim.betas"),
        *("optim.eps", "optim.clip_grad", "weight_decay_on_rel_pos_bias", "layer_decay"),
        *("encoder_lr_scale", "run.steps", "run.epochs", "run.precision", "data.max_bad_share"),
        "run.loss_mean",
        # of test images alone, and kept for those who evaluate the run
        *("crop_pct", "evaluation.stride", "evaluation.scale", "evaluation.multi_scale"),
        *("evaluation.flip", "run.gradient_dtype"),
        *SPLIT,
    }
)
NUM_IMAGES = "run.num_images"  # advised where a few were removed, see `_few_removed`
IMAGES_PER_STEP = "run.images_per_step"
LENGTH = ("run.steps", "run.epochs", "optim.warmup_steps", "optim.warmup_epochs", NUM_IMAGES)
# What a setting was before there was one; of all others: off (False, None or 0).
BEFORE = {
    "weight_decay_on_rel_pos_bias": True,
    "model.qkv_bias": True,
    "optim.schedule": "cosine",
    "optim.poly_power": 1.0,
    "run.loss_mean": "rank",
    "run.gradient_dtype": "fp32",
}
ABANDONED = "abandoned"


@dataclass(frozen=True)
class Change:
    """A setting that differs from the checkpoint's."""

    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        """Of long lists, as the names of a thousand classes, where they differ."""
        was, now = self.was, self.now
        if isinstance(was, list) and isinstance(now, list) and max(len(was), len(now)) > 8:
            pairs = enumerate(zip_longest(was, now, fillvalue="absent"))
            place, (a, b) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            return (
                f"{self.name} had {len(was)} entries, has {len(now)}; number {place} was {a!r}, is "
                f"{b!r}"
            )
        return f"{self.name} was {was!r}, is {now!r}"


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


def without_habits(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings without those that are habits."""
    return _pruned(settings, "")


def check_settings(
    path: Path,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    accepted: Sequence[str] = (),
    unknown: Collection[str] = (),
) -> list[Change]:
    """The changes that hold from the checkpoint at `path` on.

    theirs, ours: nested settings; those in `unknown` are not compared. Raises CheckpointError that
    lists every change of the run's identity that `accepted` does not name, with the flag that
    accepts them.
    """
    found = [change for change in changes(theirs, ours) if change.name not in unknown]
    if wrong := sorted(set(accepted) - _comparable(theirs).keys() - _comparable(ours).keys()):
        raise CheckpointError(
            f"{flag('run.resume_with')} names {', '.join(wrong)}, and there are no such settings: "
            "give the names that the refusal listed"
        )
    refused = [
        change for change in found if not _is_advised(change) and change.name not in accepted
    ]
    if refused:
        names = ",".join(change.name for change in refused)
        how = ""
        if any(change.name == IMAGES_PER_STEP for change in refused):
            split = f"{flag('data.batch_size')} x {flag('run.accumulate')}"
            how = f" (the images of a step are ranks x {split})"
        raise CheckpointError(
            f"{path} belongs to a run with other settings ({'; '.join(map(str, refused))}): "
            f"restore them{how}, give another {flag('run.output')}, or accept that they hold from "
            f"here on: {flag('run.resume_with')} '[{names}]'"
        )
    return found


def changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Change]:
    """Settings that differ, habits left out, by name.

    A switch or rate that is off (False, None, 0), or as BEFORE says, and that the checkpoint's
    version did not have yet is no difference, nor is one that was off and is gone now. Where the
    images of a step differ, it is that which is named, and not how they are split.
    """
    was, now = _comparable(theirs), _comparable(ours)
    implied = _off(now) | {key: value for key, value in BEFORE.items() if key in now}
    was, now = implied | was, _off(was) | now
    different = [
        Change(key, was.get(key, "absent"), now.get(key, "absent"))
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if any(change.name == IMAGES_PER_STEP for change in different):
        different = [change for change in different if change.name not in SPLIT]
    return different


def _off(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is None or value == 0}


def find_resume(
    output: Path, run: RunConfig, settings: Mapping[str, Any], world: World
) -> Resume | None:
    """The checkpoint to go on from, or None for a run from the start. Called on every rank.

    Raises CheckpointError as `check_resume` and `load_newest` do.
    """
    check_resume(output, run, settings)
    world.barrier()  # nobody reads what is about to be moved
    _go_back(output, run, settings, world)
    checkpoint = load_newest(output, fallback=run.fallback)
    if checkpoint is None:
        return None
    found = check_settings(
        checkpoint.path, checkpoint.manifest["settings"], settings, run.resume_with
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
    output: Path, run: RunConfig, settings: Mapping[str, Any], unknown: Collection[str] = ()
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
    check_settings(path, manifest["settings"], settings, run.resume_with, unknown)
    return manifest


def same_length(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether nothing changed of what a run's number of steps follows from, the split apart."""
    return not any(c.name in LENGTH for c in changes(manifest["settings"], settings))


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


def _is_advised(change: Change) -> bool:
    if change.name == NUM_IMAGES:
        return _few_removed(change.was, change.now)
    if change.name == "run.ema_decay":  # another rate; with none there is no average to go on with
        return None not in (change.was, change.now)
    return change.name in ADVISED


def _few_removed(was: Any, now: Any) -> bool:
    """Unusable images may be removed: at most ten, or one in a hundred."""
    if not isinstance(was, int) or not isinstance(now, int):
        return False
    return 0 < was - now <= max(10, was // 100)


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat, without habits, and with the images of a step, where the settings say them."""
    named = flat(without_habits(settings))
    parts = [named.get(name) for name in ("run.images_per_batch", *SPLIT[2:])]
    return named if None in parts else named | {IMAGES_PER_STEP: parts[0] * parts[1] * parts[2]}


def _pruned(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    kept = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if name in HABITS:
            continue
        kept[key] = _pruned(value, f"{name}.") if isinstance(value, Mapping) else value
    return kept
