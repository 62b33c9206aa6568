"""What may change when a run is resumed.

    habit     free: learns the same, or the same but for rounding; not recorded
    advised   may change, for errors of ours advise it: said, and recorded in the manifest's history
    identity  refused, unless accepted by name with --run.resume_with

A setting that is neither a habit nor advised belongs to the run's identity. Names are those of the
manifest's settings, and of the flags.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from beit_fast.flags import flag
from beit_fast.train.agreement import flat
from beit_fast.train.images import Images, count_of, describe
from beit_fast.train.state import CheckpointError

HABITS = frozenset(
    {
        # places: what lies there is compared, by its weights, classes or list of images
        *("run.output", "data.path", "data.test", "data.follow_links", "init_key"),
        *("data.masks", "data.test_masks", "data.classes_file"),
        # pace and reports
        *("run.log_every", "run.save_every", "run.keep", "run.save_async"),
        *("run.failed_saves", "run.requeue"),
        *("run.picture_every", "run.evaluate_every", "run.strict", "data.num_threads"),
        *("data.read_timeout", "data.read_retries", "data.cache", "data.cache_size"),
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
        *("run.loss_mean", "run.bad_steps", "run.spike", "run.spike_window"),
        # of test images alone, and kept for those who evaluate the run
        *("crop_pct", "evaluation.stride", "evaluation.scale", "evaluation.multi_scale"),
        *("evaluation.flip", "run.gradient_dtype"),
        *SPLIT,
    }
)
IMAGES = "data.images"  # advised where unusable ones were removed or repaired, see images.py
NUM_IMAGES = "run.num_images"  # the same, of versions that did not keep which images they had
IMAGES_PER_STEP = "run.images_per_step"
LENGTH = ("run.steps", "run.epochs", "optim.warmup_steps", "optim.warmup_epochs")
# What a setting was before there was one; of all others: off (False, None or 0).
BEFORE = {
    "weight_decay_on_rel_pos_bias": True,
    "model.qkv_bias": True,
    "optim.schedule": "cosine",
    "optim.poly_power": 1.0,
    "run.loss_mean": "rank",
    "run.gradient_dtype": "fp32",
    "run.bad_steps": 1,
    "run.spike_window": 100,
    "data.shuffle": "full",
    "views.decode": "full",
}


@dataclass(frozen=True)
class Change:
    """A setting that differs from the checkpoint's; of images in words, and whether it is advised
    is known only where both lists are."""

    name: str
    was: Any
    now: Any
    words: str = ""
    is_repair: bool = False

    def __str__(self) -> str:
        """Of long lists, as the names of a thousand classes, where they differ."""
        if self.words:
            return f"{self.name}: {self.words}"
        was, now = self.was, self.now
        if isinstance(was, list) and isinstance(now, list) and max(len(was), len(now)) > 8:
            pairs = enumerate(zip_longest(was, now, fillvalue="absent"))
            place, (a, b) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            return (
                f"{self.name} had {len(was)} entries, has {len(now)}; number {place} was {a!r}, is "
                f"{b!r}"
            )
        return f"{self.name} was {was!r}, is {now!r}"


def without_habits(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings without those that are habits."""
    return _pruned(settings, "")


def check_settings(
    path: Path,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    accepted: Sequence[str] = (),
    unknown: Collection[str] = (),
    images: Images | None = None,
) -> list[Change]:
    """The changes that hold from the checkpoint at `path` on.

    theirs, ours: nested settings; those in `unknown` are not compared. images: those of `ours`.
    Raises CheckpointError that lists every change of the run's identity that `accepted` does not
    name, with the flag that accepts them.
    """
    found = [change for change in changes(theirs, ours) if change.name not in unknown]
    if images is not None:
        found = _looked_at(found, path, theirs, images)
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
        if images is not None and all(c.name in (IMAGES, NUM_IMAGES) for c in refused):
            caution = f" ({images.caution})" if images.caution else ""
            raise CheckpointError(
                f"{path} belongs to a run over other images ({refused[0]}): restore the folder, "
                f"give another {flag('run.output')}, or accept it from the next pass on{caution}: "
                f"{flag('run.resume_with')} '[{names}]'"
            )
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
    # Their number follows from which they are, where that is known.
    beside = NUM_IMAGES if IMAGES in was and IMAGES in now else IMAGES
    different = [change for change in different if change.name != beside]
    if any(change.name == IMAGES_PER_STEP for change in different):
        different = [change for change in different if change.name not in SPLIT]
    return different


def _looked_at(
    found: Sequence[Change], path: Path, theirs: Mapping[str, Any], images: Images
) -> list[Change]:
    """The changes, of images with how they differ. Raises CheckpointError where the run cannot go
    on over others."""
    looked = []
    for change in found:
        if change.name == IMAGES:
            count = count_of(theirs)
            words, differs, is_repair = describe(images, path.parents[1], str(change.was), count)
            if not differs:
                continue  # but for sizes that could not be had
            change = replace(change, words=words, is_repair=is_repair)
        if images.fixed and change.name in (IMAGES, NUM_IMAGES):
            raise CheckpointError(
                f"{path} belongs to a run over other images ({change}), and {images.fixed}"
            )
        looked.append(change)
    return looked


def _off(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is None or value == 0}


def same_length(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether nothing changed of what a run's number of steps follows from, the split apart."""
    return not any(c.name in LENGTH for c in changes(manifest["settings"], settings))


def _is_advised(change: Change) -> bool:
    if change.name == IMAGES:
        return change.is_repair
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
