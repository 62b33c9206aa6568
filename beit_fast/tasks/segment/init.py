"""Where training a segmenter starts: what a checkpoint gives it, and what starts anew.

The encoder's architecture is the checkpoint's (tasks/architecture.py), of any task. A segmenter's
pyramid and heads stay as far as they are built alike, its last convolutions only for the classes
that they were trained on; where the recipe leaves taps and channels open, they are its as well.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from beit_fast.model.config import SegmenterConfig
from beit_fast.model.segmenter import BeitForSemanticSegmentation
from beit_fast.tasks.architecture import architecture, as_begun, begun_without, followed, read_init
from beit_fast.tasks.evaluate.checkpoints import weights_digest
from beit_fast.weights.load import load_pretrained
from beit_fast.weights.read import Weights

OF_HEAD = ("taps", "head_channels")  # None in a recipe: the checkpoint's


@dataclass(frozen=True)
class Start:
    """A model to train. `digest` is that of the weights it came from (None: from scratch)."""

    model: BeitForSemanticSegmentation
    digest: str | None
    report: str  # what came from where, in a few lines


def starting_point(
    wanted: SegmenterConfig,
    init: str | None,
    key: str | None,
    classes: tuple[str, ...],
    seed: int,
    output: Path | None = None,
) -> Start:
    """The segmenter of `wanted` with the weights of `init`, anything `read_checkpoint` reads.

    What the checkpoint lacks starts as `seed` draws it. `output` is a run's: if it was begun, and
    `init` has gone since, it goes on without. Raises ValueError where the data has not the classes
    that `wanted` counts, and as `read_init` does.
    """
    if wanted.num_classes not in (0, len(classes)):
        raise ValueError(
            f"the data has {len(classes)} classes and the model {wanted.num_classes}: give data of "
            f"as many, or pass --model.num_classes {len(classes)} (0: as many as the data has)"
        )
    wanted = dataclasses.replace(wanted, num_classes=len(classes))
    torch.manual_seed(seed)
    if init is None:
        return Start(BeitForSemanticSegmentation(wanted), None, "from scratch: no init was given")
    try:
        weights = read_init(wanted, init, key)
    except (ValueError, OSError) as error:
        begun = begun_without(init, output)
        if begun is None:
            raise
        model = BeitForSemanticSegmentation(as_begun(wanted, begun, *OF_HEAD))
        why = f"{init} is no longer there ({error}): the run goes on from its own checkpoint"
        return Start(model, begun.get("init"), why)
    config = _with_its_head(architecture(wanted, weights), weights)
    notes = [f"{init}: a {weights.task} checkpoint", *followed(wanted, config)]
    if weights.task != "segmentation":
        notes.append("it has no pyramid and no head for pixels: these start anew")
    model = BeitForSemanticSegmentation(config)
    anew: dict[str, Tensor] = {}
    if weights.labels is not None and weights.labels != classes:
        notes.append("its classes are not those of the data: what scores classes starts anew")
        anew = {n: t.clone() for n, t in model.state_dict().items() if ".conv_seg." in n}
    report = load_pretrained(model, weights)
    model.load_state_dict(model.state_dict() | anew)
    report = dataclasses.replace(report, fresh=_by_part(report.fresh, model))
    return Start(model, weights_digest(weights.state), "\n".join([*notes, str(report)]))


def _by_part(names: tuple[str, ...], model: BeitForSemanticSegmentation) -> tuple[str, ...]:
    """A part of which all names are there by its own name: a head has some eighty tensors."""
    told: set[str] = set()
    for part in {name.partition(".")[0] for name in names}:
        here = {name for name in names if name.partition(".")[0] == part}
        whole = {name for name in model.state_dict() if name.partition(".")[0] == part}
        told |= {part} if here == whole else here
    return tuple(sorted(told))


def _with_its_head(config: SegmenterConfig, weights: Weights) -> SegmenterConfig:
    theirs = weights.config
    if not isinstance(theirs, SegmenterConfig) or theirs.head != config.head:
        return config
    left_open = [name for name in OF_HEAD if getattr(config, name) is None]
    return dataclasses.replace(config, **{name: getattr(theirs, name) for name in left_open})
