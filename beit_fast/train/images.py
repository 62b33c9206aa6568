"""Which images a run has had, from which sample on: in its manifests, and as lists in its folder.

    <output>/images/<digest>.txt.gz     the names, written once
    manifest.json                       "images": [{"first": 0, "epoch": 0, "count": 997, ...}, ...]

What a list holds, and what the stream of samples is made of, a task's `images` say; here it is only
told apart, kept and gone on with.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from beit_fast.flags import flag
from beit_fast.train.state import MANIFEST, CheckpointError
from beit_fast.train.world import World

if TYPE_CHECKING:
    from beit_fast.train.resume import Resume
    from beit_fast.train.task import Task

FOLDER = "images"
Parts = list[dict[str, Any]]  # of a run's stream of samples, as a manifest holds them


class Difference(Protocol):
    """From one list of images to another; false where there is none, said in words by `str`."""

    @property
    def is_repair(self) -> bool:
        """Whether it is no more than errors about unusable images advise."""
        ...


class Images(Protocol):
    """The images of a task, and how its batches follow another list of them."""

    fixed: str  # why the run cannot go on over another list, and what to do; "": it can
    caution: str  # what to say besides where it would
    note: str  # what becomes of the pass that the run is in

    def __len__(self) -> int: ...

    @property
    def digest(self) -> str:
        """Of names, order and some sizes."""
        ...

    def keep(self, folder: Path) -> None:
        """Write the list. Raises OSError."""

    def difference(self, folder: Path, digest: str, count: int) -> Difference:
        """From a list that was kept to that of now. Raises ValueError where it is no more."""
        ...

    def begin(self) -> Parts:
        """Of a run from the start."""
        ...

    def go_on(self, before: Sequence[dict[str, Any]], sample: int, folder: Path) -> Parts:
        """Of a run whose next sample this is; its batches are theirs from now on. Raises ValueError
        for parts that are none."""
        ...

    def epochs(self, sample: int, every: float = 1.0) -> float:
        """How many times `every` passes are over before this sample."""
        ...


def describe(images: Images, output: Path, was: str, count: int) -> tuple[str, bool, bool]:
    """(in words how the list of digest `was` differs from that of now, whether it does, whether
    errors of ours advise it)."""
    try:
        found = images.difference(output / FOLDER, was, count)
    except ValueError as error:
        words = f"they are others than the {count} of before, which are not known ({error})"
        return words, True, False
    return str(found), bool(found), found.is_repair


def count_of(settings: Mapping[str, Any]) -> int:
    """The number of images that a manifest's settings say; 0 where they say none."""
    of_run = settings.get("run")
    count = of_run.get("num_images") if isinstance(of_run, Mapping) else None
    return count if type(count) is int else 0


def follow(
    task: "Task", resume: "Resume | None", output: Path, images_per_step: int, world: World
) -> Parts:
    """The parts of the run from its next step on, for its manifests; the list of now is kept.

    Called on every rank. Raises CheckpointError for a manifest whose parts are none, ValueError for
    ranks that would not go on alike, OSError where the list cannot be written.
    """
    images, folder = task.images, output / FOLDER
    if resume is None:
        parts = images.begin()
    else:
        sample = resume.checkpoint.step * images_per_step
        try:
            parts = images.go_on(_before(resume.manifest), sample, folder)
        except ValueError as error:
            raise CheckpointError(
                f"{resume.checkpoint.path / MANIFEST} is damaged: {error}. Restore it, or go back "
                f"before it: {flag('run.resume_from')} with the step of another checkpoint"
            ) from error
    world.agree({"images by pass": parts})
    if world.is_main:
        images.keep(folder)
    return parts


def follow_again(
    task: "Task", manifest: Mapping[str, Any], output: Path, sample: int, accepted: Sequence[str]
) -> None:
    """The batches of `task` are from now on those of the run of that manifest, from `sample` on,
    which is its next one or an earlier one. Nothing is kept.

    accepted: settings that the run went on with. Raises ValueError for images that neither it nor
    what it went on with has.
    """
    images, settings = task.images, manifest["settings"]
    was, count = settings.get("data", {}).get("images"), count_of(settings)
    words, differs = f"{count} then, {len(images)} now", count != len(images)
    if was is not None and was != images.digest:
        words, differs, _ = describe(images, output, str(was), count)
    if differs and "data.images" not in accepted:
        raise ValueError(
            f"the images are not those of the run ({words}): pass {flag('data.path')} with the "
            "folder of then, or, where the run went on over these, "
            f"{flag('run.resume_with')} '[data.images]'"
        )
    images.go_on(_before(manifest), sample, output / FOLDER)


def _before(manifest: Mapping[str, Any]) -> Parts:
    """A version that did not keep lists had one for good, of which the number is known."""
    if "images" in manifest:
        return manifest["images"]
    count = count_of(manifest["settings"])
    return [{"first": 0, "epoch": 0, "count": count, "images": ""}]
