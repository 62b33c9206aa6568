"""What a run that starts from a checkpoint takes of it besides weights.

The checkpoint decides the architecture, for its weights fit no other; the recipe decides what can
be chosen: the size of the images, to which positions are resized, drop path, heads, and for a
checkpoint with one table of relative positions whether blocks share it (fine-tuning gives each its
own copy).
"""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from beit_fast.model.config import BeitConfig
from beit_fast.train.state import newest_manifest
from beit_fast.weights.read import Weights, read_checkpoint
from beit_fast.weights.sizes import UnknownHeads

ARCHITECTURE = (
    *("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "attn_head_dim", "mlp_ratio"),
    *("qkv_bias", "init_values", "use_abs_pos_emb", "norm_eps"),
)
TABLES = ("use_rel_pos_bias", "use_shared_rel_pos_bias")
Config = TypeVar("Config", bound=BeitConfig)


def architecture(wanted: Config, weights: Weights) -> Config:
    """`wanted` with the architecture of the weights."""
    theirs = weights.config
    fields: dict[str, Any] = {name: getattr(theirs, name) for name in ARCHITECTURE}
    own, shared = (getattr(theirs, name) for name in TABLES)
    if shared and not own and (wanted.use_rel_pos_bias or not wanted.use_shared_rel_pos_bias):
        own, shared = True, False
    fields |= dict(zip(TABLES, (own, shared), strict=True))
    return dataclasses.replace(wanted, **fields)


def followed(wanted: BeitConfig, config: BeitConfig) -> list[str]:
    """What became of `wanted`, in a line; none where nothing did."""
    changed = [
        f"{name} {getattr(config, name)} (the recipe has {getattr(wanted, name)})"
        for name in ARCHITECTURE
        if getattr(config, name) != getattr(wanted, name)
    ]
    return [f"the model is the checkpoint's: {', '.join(changed)}"] if changed else []


def read_init(wanted: BeitConfig, init: str, key: str | None) -> Weights:
    """Anything `read_checkpoint` reads. Where it does not say its heads, `wanted` does if it has
    as many blocks of the same width; where its positions are as many as the grid of `wanted` has,
    that is their grid. Raises ValueError and OSError as `read_checkpoint` does."""
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


def begun_without(init: str, output: Path | None) -> dict[str, Any] | None:
    """The settings of the run in `output` where it was begun and `init` has gone since."""
    if output is None or Path(init).exists():
        return None
    manifest = newest_manifest(output)
    return None if manifest is None else manifest["settings"]


def as_begun(wanted: Config, settings: dict[str, Any], *also: str) -> Config:
    """`wanted` with the architecture that the settings of a run have, and the fields `also`."""
    names = (*ARCHITECTURE, *TABLES, *also)
    theirs = {name: settings["model"][name] for name in names if name in settings["model"]}
    pairs = {name: tuple(value) for name, value in theirs.items() if isinstance(value, list)}
    return dataclasses.replace(wanted, **theirs | pairs)
