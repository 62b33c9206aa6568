"""A BEiT checkpoint of any layout, found whole: house names, and the config they make.

Reading is strict: names that no BEiT has, tensors that are missing or of another shape are an
error that lists them.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from beit_fast.kernels.rel_pos_bias import relative_position_rows
from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.hf_config import (
    fields_of_hf_config,
    labels_of_hf_config,
    mlp_ratio_of,
    taps_of_hf_config,
)
from beit_fast.model.layouts import (
    SEGMENTATION,
    find_layout,
    missing_of_segmentation,
    shorten,
    to_house,
)
from beit_fast.model.published import PUBLISHED, find_published
from beit_fast.model.weight_files import read_weights

Task = Literal["mim", "classifier", "features", "encoder", "segmentation"]
MODEL_CLASSES: dict[str, type[Beit]] = {
    "mim": BeitForMaskedImageModeling,
    "classifier": BeitForImageClassification,
    "features": BeitForImageClassification,  # no classes
}  # the others: Beit
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
OWN_TABLE = "blocks.{}.attn.relative_position_bias_table"
_PUBLISHED_HEAD_DIM = 64
_COUNTED = {
    "head.weight": "num_classes",
    "decode_head.conv_seg.weight": "num_classes",
    "lm_head.weight": "vocab_size",
}  # rows -> field


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checkpoint that was read and found whole, under house names."""

    state: dict[str, Tensor]
    config: BeitConfig
    task: Task
    layout: str  # of the source: house, hf4 or hf5
    stated: frozenset[str] = frozenset()  # fields of config that the source states, not its shapes
    dropped: tuple[str, ...] = ()  # index buffers
    labels: tuple[str, ...] | None = None  # names of the classes
    taps: tuple[int, ...] | None = None  # blocks that feed a segmentation head


Source = str | Path | Mapping[str, Tensor] | Weights


def read_checkpoint(source: Source, *, key: str | None = None, **stated: Any) -> Weights:
    """Read any BEiT: a path or published name, or tensors by name, in any of the layouts.

    The config comes from the file where it has one (config.json, a run's manifest, ours), else
    from the shapes. `stated` are fields of BeitConfig that shapes cannot tell and no file says:
    `img_size` of a grid that is not square, `num_heads` of a vanilla BEiT whose heads are not of
    64 channels, `norm_eps`. `key` is `read_weights`'s.
    Raises FileNotFoundError, OSError for a name that cannot be had, ValueError for a file that is
    damaged or of no BEiT.
    """
    if isinstance(source, Weights):
        if key is not None or stated:
            raise ValueError(f"these weights are read already: pass {[key, *stated]} when reading")
        return source
    hf_config, labels, taps = None, None, None
    if isinstance(source, Mapping):
        tensors, where = dict(source), "the state dict"
    else:
        path = Path(source)
        if not path.exists() and _is_published(str(source)):
            path, entry = find_published(str(source))
            stated = _published_fields(str(source), entry) | stated
        file = read_weights(path, key=key)
        tensors, where, hf_config = file.tensors, str(file.path), file.hf_config
        labels = file.classes
        stated = _own_fields(file.config, where) | stated
    try:
        layout = find_layout(tensors)
        state, dropped = to_house(tensors)
        if hf_config is not None:
            try:
                stated = fields_of_hf_config(hf_config) | stated
                labels, taps = labels_of_hf_config(hf_config), taps_of_hf_config(hf_config)
            except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
                raise ValueError(f"config.json is damaged ({error}): copy it anew") from error
        task = task_of(state)
        config = _config_of(state, task, stated)
        _check(state, task, config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if labels is not None and task == "classifier" and len(labels) != config.num_classes:
        raise ValueError(f"{where}: {len(labels)} names of classes, {config.num_classes} rows")
    return Weights(
        state=state,
        config=config,
        task=task,
        layout=layout,
        stated=frozenset(stated),
        dropped=dropped,
        labels=labels,
        taps=taps,
    )


def task_of(state: Mapping[str, Any]) -> Task:
    """What these tensors, by house name, were trained for."""
    parts = {name.split(".")[0] for name in state}
    if "lm_head" in parts:
        return "mim"
    if "decode_head" in parts:
        return "segmentation"
    if "head" in parts:
        return "classifier"
    return "features" if parts & {"fc_norm", "norm"} else "encoder"


def _config_of(state: Mapping[str, Tensor], task: Task, stated: Mapping[str, Any]) -> BeitConfig:
    """The config whose model has these tensors; `stated` wins where it speaks."""
    try:
        embed_dim, in_chans, *patch = state["patch_embed.proj.weight"].shape
        width = len(state["blocks.0.attn.q_bias"])
        hidden = len(state["blocks.0.mlp.fc1.weight"])
        patch_height, patch_width = patch
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the sizes cannot be read from the tensors: {error} is missing or misshapen"
        ) from error
    misshapen = [
        n
        for n in (*_COUNTED, SHARED_TABLE, OWN_TABLE.format(0))
        if n in state and not state[n].ndim
    ]
    if misshapen:
        raise ValueError(f"{misshapen} have no axes: rows are needed")
    table = state.get(SHARED_TABLE, state.get(OWN_TABLE.format(0)))
    num_heads = stated.get("num_heads")
    if num_heads is None:
        num_heads = table.shape[-1] if table is not None else width // _PUBLISHED_HEAD_DIM
        if num_heads < 1 or width % num_heads:
            raise ValueError(
                f"{width} channels of attention do not say how many heads: pass num_heads"
            )
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    fields: dict[str, Any] = {
        "patch_size": patch_height if patch_height == patch_width else (patch_height, patch_width),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "attn_head_dim": None if width == embed_dim else width // num_heads,
        "mlp_ratio": mlp_ratio_of(hidden, embed_dim),
        # The value that training began with is not stored: unilm's by depth.
        "init_values": (0.1 if depth <= 12 else 1e-5) if "blocks.0.gamma_1" in state else None,
        "use_abs_pos_emb": "pos_embed" in state,
        "use_rel_pos_bias": OWN_TABLE.format(0) in state,
        "use_shared_rel_pos_bias": SHARED_TABLE in state,
        "global_pool": "token" if task != "mim" and "norm.weight" in state else "avg",
        "num_classes": 0,
    }
    for name, count in _COUNTED.items():
        if name in state:
            fields[count] = len(state[name])
    if "img_size" not in stated:
        side = _square_side(table, state.get("pos_embed"))
        fields["img_size"] = (
            side * patch_height
            if patch_height == patch_width
            else (side * patch_height, side * patch_width)
        )
    fields |= stated
    if task in ("mim", "features", "encoder"):
        fields["num_classes"] = 0
    if task == "features":
        fields["global_pool"] = "token" if "norm.weight" in state else "avg"
    return BeitConfig(**fields)


def _square_side(table: Tensor | None, pos_embed: Tensor | None) -> int:
    """Patches along one side, from the rows of a table or of positions."""
    if table is None and pos_embed is None:
        raise ValueError("no positions, so no size of images: pass img_size")
    if table is not None:
        side = (math.isqrt(max(len(table) - 3, 0)) + 1) // 2
        if side >= 1 and relative_position_rows((side, side)) == len(table):
            return side
        raise ValueError(f"a table of {len(table)} rows is of no square grid: pass img_size")
    patches = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    side = math.isqrt(max(patches, 0))
    if side >= 1 and side * side == patches:
        return side
    raise ValueError(f"positions {tuple(pos_embed.shape)} are of no square grid: pass img_size")


def _check(state: Mapping[str, Tensor], task: Task, config: BeitConfig) -> None:
    """Every tensor the task's model has, of its shape, and none that it has no place for."""
    numbers = [n for n, t in state.items() if not (t.is_floating_point() or n.endswith("_tracked"))]
    if numbers:
        kinds = {str(state[name].dtype) for name in numbers}
        raise ValueError(f"{', '.join(kinds)} where weights belong: {shorten(sorted(numbers))}")
    with torch.device("meta"):
        wanted = MODEL_CLASSES.get(task, Beit)(config).state_dict()
    encoder = {
        name: tensor
        for name, tensor in state.items()
        if name in wanted
        or not (
            name == "mask_token" or SEGMENTATION.match(name) or name.startswith("cls_pt_layers.")
        )
    }
    compare_tensors(encoder, wanted, "its config")
    if task == "segmentation" and (missing := missing_of_segmentation(state)):
        raise ValueError(f"{len(missing)} tensors of the heads are missing: {shorten(missing)}")


def compare_tensors(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], whose: str) -> None:
    """Raise ValueError that lists where names or shapes differ."""
    problems = [
        *(f"{name} is missing" for name in wanted.keys() - state.keys()),
        *(f"{name} has no place" for name in state.keys() - wanted.keys()),
        *(
            f"{name} is {tuple(state[name].shape)} where {tuple(wanted[name].shape)} belongs"
            for name in state.keys() & wanted.keys()
            if state[name].shape != wanted[name].shape
        ),
    ]
    if problems:
        raise ValueError(
            f"{len(problems)} tensors do not fit {whose}: {shorten(sorted(problems))}; nothing was "
            "loaded"
        )


def _own_fields(config: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """Our own config as a file holds it. Raises ValueError where it is of another version."""
    if config is None:
        return {}
    known = {f.name for f in dataclasses.fields(BeitConfig)}
    unknown = sorted(config.keys() - known)
    if unknown:
        raise ValueError(f"{where}: its config has {unknown}: read it with the beit_fast it is of")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def _is_published(name: str) -> bool:
    return name in PUBLISHED or any(name == entry.hf_id for entry in PUBLISHED.values())


def _published_fields(name: str, entry: Any) -> dict[str, Any]:
    """By unilm's name a checkpoint is what it was trained as; by the hub's, what the hub says.

    The difference: transformers' files have norm_eps 1e-12 where the training had 1e-6.
    """
    if name == entry.hf_id:
        return {}
    return {"norm_eps": entry.config.norm_eps, "init_values": entry.config.init_values}
