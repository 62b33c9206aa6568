"""Where fine-tuning starts: the classifier of the folders' classes, and what a checkpoint gives it.

The architecture is the checkpoint's (tasks/architecture.py). A head stays only if it was trained on
the same classes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.tasks.architecture import architecture, as_begun, begun_without, followed, read_init
from beit_fast.tasks.evaluate.checkpoints import weights_digest
from beit_fast.weights.load import load_pretrained


@dataclass(frozen=True)
class Start:
    """A model to fine-tune. `digest` is that of the weights it came from (None: from scratch)."""

    model: BeitForImageClassification
    digest: str | None
    report: str  # what came from where, in a few lines


def starting_point(
    wanted: BeitConfig,
    init: str | None,
    key: str | None,
    classes: list[str],
    seed: int,
    output: Path | None = None,
) -> Start:
    """The classifier of `wanted` with the weights of `init`, anything `read_checkpoint` reads.

    What the checkpoint lacks starts as `seed` draws it, the head near 0. `output` is a run's: if it
    was begun, and `init` has gone since, it goes on without. Raises ValueError where the folders do
    not have the classes that `wanted` counts, and as `read_init` does.
    """
    if wanted.num_classes not in (0, len(classes)):
        raise ValueError(
            f"there are {len(classes)} class folders and the model has {wanted.num_classes} "
            f"classes: complete the folders, or pass --model.num_classes {len(classes)} (0: as "
            "many as there are folders)"
        )
    wanted = dataclasses.replace(wanted, num_classes=len(classes))
    torch.manual_seed(seed)
    if init is None:
        return Start(BeitForImageClassification(wanted), None, "from scratch: no init was given")
    try:
        weights = read_init(wanted, init, key)
    except (ValueError, OSError) as error:
        begun = begun_without(init, output)
        if begun is None:
            raise
        model = BeitForImageClassification(as_begun(wanted, begun))
        why = f"{init} is no longer there ({error}): the run goes on from its own checkpoint"
        return Start(model, begun.get("init"), why)
    digest = weights_digest(weights.state)
    notes = [f"{init}: a {weights.task} checkpoint"]
    if weights.labels is not None and list(weights.labels) != classes:
        notes.append("its classes are not those of the folders: the head starts anew")
        kept = {n: t for n, t in weights.state.items() if not n.startswith("head.")}
        weights = dataclasses.replace(weights, state=kept)
    config = architecture(wanted, weights)
    notes += followed(wanted, config)
    model = BeitForImageClassification(config)
    report = load_pretrained(model, weights)
    return Start(model, digest, "\n".join([*notes, str(report)]))
