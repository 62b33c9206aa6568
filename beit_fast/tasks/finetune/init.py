"""Where fine-tuning starts: the classifier of the folders' classes, and what a checkpoint gives it.

The checkpoint decides the architecture, for its weights fit no other; the recipe decides what can
be chosen: the size of the images, to which positions are resized, drop path, pooling, and for a
checkpoint with one table of relative positions whether blocks share it (fine-tuning gives each its
own copy). A head stays only if it was trained on the same classes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.tasks.evaluate.checkpoints import weights_digest
from beit_fast.train.state import newest_manifest
from beit_fast.weights.load import load_pretrained
from beit_fast.weights.read import Weights, read_checkpoint
from beit_fast.weights.sizes import UnknownHeads

ARCHITECTURE = (
    *("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "attn_head_dim", "mlp_ratio"),
    *("qkv_bias", "init_values", "use_abs_pos_emb", "norm_eps"),
)


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

    What the checkpoint lacks starts as `seed` draws it, the head near 0. Where it does not say its
    heads, `wanted` does if it has as many blocks of the same width; where its positions are as
    many as the grid of `wanted` has, that is their grid. `output` is a run's: if it was begun, and
    `init` has gone since, it goes on without. Raises ValueError where the folders do not have the
    classes that `wanted` counts, and as `read_checkpoint` does.
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
        weights = _read(wanted, init, key)
    except (ValueError, OSError) as error:
        begun = newest_manifest(output) if output is not None and not Path(init).exists() else None
        if begun is None:
            raise
        return _begun(wanted, begun, f"{init} is no longer there ({error})")
    digest = weights_digest(weights.state)
    notes = [f"{init}: a {weights.task} checkpoint"]
    if weights.labels is not None and list(weights.labels) != classes:
        notes.append("its classes are not those of the folders: the head starts anew")
        kept = {n: t for n, t in weights.state.items() if not n.startswith("head.")}
        weights = dataclasses.replace(weights, state=kept)
    config = architecture(wanted, weights)
    if followed := [
        f"{name} {getattr(config, name)} (the recipe has {getattr(wanted, name)})"
        for name in ARCHITECTURE
        if getattr(config, name) != getattr(wanted, name)
    ]:
        notes.append(f"the model is the checkpoint's: {', '.join(followed)}")
    model = BeitForImageClassification(config)
    report = load_pretrained(model, weights)
    return Start(model, digest, "\n".join([*notes, str(report)]))


def _begun(wanted: BeitConfig, manifest: dict[str, Any], why: str) -> Start:
    """The model of a run that was begun; its weights are in its checkpoints."""
    settings = manifest["settings"]
    names = (*ARCHITECTURE, "use_rel_pos_bias", "use_shared_rel_pos_bias")
    theirs = {name: settings["model"][name] for name in names if name in settings["model"]}
    model = BeitForImageClassification(dataclasses.replace(wanted, **theirs))
    return Start(model, settings.get("init"), f"{why}: the run goes on from its own checkpoint")


def architecture(wanted: BeitConfig, weights: Weights) -> BeitConfig:
    """`wanted` with the architecture of the weights."""
    theirs = weights.config
    fields: dict[str, Any] = {name: getattr(theirs, name) for name in ARCHITECTURE}
    own, shared = theirs.use_rel_pos_bias, theirs.use_shared_rel_pos_bias
    if shared and not own and (wanted.use_rel_pos_bias or not wanted.use_shared_rel_pos_bias):
        own, shared = True, False
    fields |= {"use_rel_pos_bias": own, "use_shared_rel_pos_bias": shared}
    return dataclasses.replace(wanted, **fields)


def _read(wanted: BeitConfig, init: str, key: str | None) -> Weights:
    try:
        weights = read_checkpoint(init, key=key, unless_stated={"img_size": wanted.img_size})
    except UnknownHeads as unknown:
        if (wanted.embed_dim, wanted.depth) != unknown.sizes:
            raise ValueError(
                f"{unknown}: --model.num_heads of the checkpoint, with --model.embed_dim "
                f"{unknown.sizes[0]} --model.depth {unknown.sizes[1]}, which say that it is meant"
            ) from unknown
        given = {"img_size": wanted.img_size, "num_heads": wanted.num_heads}
        weights = read_checkpoint(init, key=key, unless_stated=given)
    return weights
