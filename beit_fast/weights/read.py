"""A BEiT checkpoint of any layout, found whole: house names, and the config they make.

Reading is strict: names that no BEiT has, tensors that are missing or of another shape are an
error that lists them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig, SegmenterConfig
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.segmenter import BeitForSemanticSegmentation
from beit_fast.weights.description import Description, Statistics
from beit_fast.weights.files import read_weights
from beit_fast.weights.hf_config import (
    fields_of_hf_config,
    labels_of_hf_config,
    mlp_ratio_of,
)
from beit_fast.weights.layouts import (
    SEGMENTATION,
    find_layout,
    shorten,
    to_house,
)
from beit_fast.weights.published import PUBLISHED, find_published
from beit_fast.weights.segmenters import (
    add_counters,
    fields_of_heads,
    segmenter_differs,
    segmenter_fields_of_hf_config,
)
from beit_fast.weights.sizes import UnknownHeads, grid_of, num_heads_of

Task = Literal["mim", "classifier", "features", "encoder", "segmentation"]
MODEL_CLASSES: dict[str, type[Beit]] = {
    "mim": BeitForMaskedImageModeling,
    "classifier": BeitForImageClassification,
    "features": BeitForImageClassification,  # no classes
    "segmentation": BeitForSemanticSegmentation,
}  # the others: Beit
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
OWN_TABLE = "blocks.{}.attn.relative_position_bias_table"
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
    guesses: tuple[str, ...] = ()  # what nothing states and shapes leave open, in words
    labels: tuple[str, ...] | None = None  # names of the classes
    statistics: Statistics | None = None  # of pixels, where a file or a run of ours says so
    crop_pct: float | None = None  # of test images, likewise


Source = str | Path | Mapping[str, Tensor] | Weights


def read_checkpoint(
    source: Source,
    *,
    key: str | None = None,
    unless_stated: Mapping[str, Any] = {},
    **stated: Any,
) -> Weights:
    """Read any BEiT: a path or published name, or tensors by name, in any of the layouts.

    The config comes from the file where it has one (config.json, a run's manifest, ours), else
    from the shapes. `stated` are fields of BeitConfig that shapes cannot tell and no file says:
    `img_size` of a grid that is not square, `num_heads` of a vanilla BEiT of no published size,
    `norm_eps`. `unless_stated` may have an `img_size` and `num_heads` too, which count only where
    the file leaves them open. `key` is `read_weights`'s. What shapes leave open all the same and
    is taken by custom is in `guesses`.
    Raises FileNotFoundError, OSError for a name that cannot be had, ValueError for a file that is
    damaged or of no BEiT, that does not say what has to be known, or that has NaN or infinity.
    """
    if isinstance(source, Weights):
        if key is not None or stated:
            raise ValueError(f"these weights are read already: pass {[key, *stated]} when reading")
        return source
    hf_config, said, published_statistics = None, Description(), None
    if isinstance(source, Mapping):
        tensors, where = dict(source), "the state dict"
    else:
        path = Path(source)
        if not path.exists() and _is_published(str(source)):
            path, entry = find_published(str(source))
            stated = _published_fields(str(source), entry) | stated
            published_statistics = entry.mean, entry.std
        file = read_weights(path, key=key)
        tensors, where, hf_config = file.tensors, str(file.path), file.hf_config
        said = file.said
    labels, statistics = said.classes, said.statistics or published_statistics
    try:
        layout = find_layout(tensors)
        state, dropped = to_house(tensors)
        task = task_of(state)
        of_file = _own_fields(said.config, task)
        if hf_config is not None:
            try:
                of_file |= fields_of_hf_config(hf_config)  # the newer: it can be edited
                labels = labels_of_hf_config(hf_config) or labels
                if task == "segmentation":
                    of_file |= segmenter_fields_of_hf_config(hf_config)
            except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
                raise ValueError(f"config.json is damaged ({error}): copy it anew") from error
        _drop_zero_biases(state, of_file if hf_config is None else hf_config)
        stated = of_file | stated
        config, guesses = _config_of(state, task, layout, stated, unless_stated)
        if task == "segmentation":
            add_counters(state)
            guesses += (segmenter_differs(config),) if layout != "house" else ()
        _check(state, task, config)
        check_finite(state)
    except UnknownHeads as error:
        raise UnknownHeads(f"{where}: {error}", error.sizes) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    has_classes = task in ("classifier", "segmentation")
    if has_classes and labels is not None and len(labels) != config.num_classes:
        raise ValueError(f"{where}: {len(labels)} names of classes, {config.num_classes} rows")
    return Weights(
        state=state,
        config=config,
        task=task,
        layout=layout,
        stated=frozenset(stated),
        dropped=dropped,
        guesses=guesses,
        labels=labels,
        statistics=statistics,
        crop_pct=said.crop_pct,
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


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError that names the tensors with NaN or infinity, and how many they have.

    Costs a sum of each: for Base in fp32 40 ms of a core, where `isfinite` of all takes 530.
    """
    bad = {}
    for name, tensor in tensors.items():
        # A sum is finite only if all are; it may also overflow, and then it is counted.
        is_number = tensor.is_floating_point() and not tensor.is_meta
        if is_number and tensor.itemsize == 1:
            tensor = tensor.float()  # torch adds up no fp8
        if is_number and not tensor.sum().isfinite() and (n := int((~tensor.isfinite()).sum())):
            bad[name] = n
    if bad:
        shown = [f"{name} ({n} of {tensors[name].numel()})" for name, n in sorted(bad.items())]
        raise ValueError(
            f"{sum(bad.values())} values of {len(bad)} tensors are NaN or infinite: "
            f"{shorten(shown)}; take weights from before the training diverged, or look at these "
            "with beit_fast.weights.files.read_weights, which loads them into no model"
        )


def _config_of(
    state: Mapping[str, Tensor],
    task: Task,
    layout: str,
    stated: Mapping[str, Any],
    unless_stated: Mapping[str, Any],
) -> tuple[BeitConfig, tuple[str, ...]]:
    """The config whose model has these tensors, `stated` winning where it speaks; and guesses."""
    try:
        embed_dim, in_chans, *patch = state["patch_embed.proj.weight"].shape
        width = len(state["blocks.0.attn.qkv.weight"]) // 3
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
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    guesses = []
    num_heads = stated.get("num_heads")
    if num_heads is None:
        wanted = unless_stated.get("num_heads")
        num_heads, guess = num_heads_of(table, width, (embed_dim, depth), wanted)
        guesses += [] if guess is None else [guess]
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
        wanted = unless_stated.get("img_size")
        patch_pixels = patch_height, patch_width
        shapes = (table, state.get("pos_embed"), patch_pixels)
        grid, guess = grid_of(*shapes, (embed_dim, depth), wanted)
        guesses += [] if guess is None else [guess]
        height, width = (n * pixels for n, pixels in zip(grid, patch_pixels, strict=True))
        fields["img_size"] = height if height == width else (height, width)
    if layout != "house" and "norm_eps" not in stated:
        guesses.append(
            f"norm_eps is {BeitConfig.norm_eps}: transformers' files have 1e-12 in their "
            "config.json, which is not here; pass norm_eps, or the folder"
        )
    fields |= stated
    fields["qkv_bias"] = "blocks.0.attn.q_bias" in state
    if task in ("mim", "features", "encoder"):
        fields["num_classes"] = 0
    if task == "features":
        fields["global_pool"] = "token" if "norm.weight" in state else "avg"
    if task != "segmentation":
        return BeitConfig(**fields), tuple(guesses)
    return SegmenterConfig(**fields_of_heads(state, embed_dim) | fields), tuple(guesses)


def _drop_zero_biases(state: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """Take out the zeros that stand for no biases where transformers has no model without them.

    config: config.json's, or without one the fields that the file itself says.
    """
    names = [name for name in state if name.endswith((".attn.q_bias", ".attn.v_bias"))]
    if config.get("qkv_bias") is False and not any(state[name].any() for name in names):
        for name in names:
            del state[name]


def _check(state: Mapping[str, Tensor], task: Task, config: BeitConfig) -> None:
    """Every tensor the task's model has, of its shape, and none that it has no place for."""
    numbers = [n for n, t in state.items() if not (t.is_floating_point() or n.endswith("_tracked"))]
    if numbers:
        kinds = {str(state[name].dtype) for name in numbers}
        raise ValueError(f"{', '.join(kinds)} where weights belong: {shorten(sorted(numbers))}")
    with torch.device("meta"):
        wanted = MODEL_CLASSES.get(task, Beit)(config).state_dict()
    part = {  # a pyramid without heads is no task of its own
        name: tensor
        for name, tensor in state.items()
        if name in wanted
        or not (
            name == "mask_token"
            or (task != "segmentation" and SEGMENTATION.match(name))
            or name.startswith("cls_pt_layers.")
        )
    }
    if task == "segmentation" and config.patch_pixels == (8, 8) and "fpn1.3.weight" in part:
        raise ValueError(
            "a pyramid of transformers for patches of 8 pixels, whose strides are 2, 4, 8 and 16: "
            "the one here is unilm's, with 4, 8, 16 and 32; read the encoder without fpn1"
        )
    compare_tensors(part, wanted, "its config")


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


def _own_fields(config: Mapping[str, Any] | None, task: Task) -> dict[str, Any]:
    """Our own config as a file holds it, the fields that a model of this task has.

    Raises ValueError where it is of another version.
    """
    if config is None:
        return {}
    config = {name: value for name, value in config.items() if name not in BeitConfig.REMOVED}
    known, of_segmenter = (
        {field.name for field in dataclasses.fields(kind)} for kind in (BeitConfig, SegmenterConfig)
    )
    unknown = sorted(config.keys() - of_segmenter)
    if unknown:
        raise ValueError(f"its config has {unknown}: read it with the beit_fast it is of")
    # An encoder that was taken out of a segmenter may come with its config.
    known = of_segmenter if task == "segmentation" else known
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}


def _is_published(name: str) -> bool:
    return name in PUBLISHED or any(name == entry.hf_id for entry in PUBLISHED.values())


def _published_fields(name: str, entry: Any) -> dict[str, Any]:
    """By unilm's name a checkpoint is what it was trained as; by the hub's, what the hub says.

    The difference: transformers' files have norm_eps 1e-12 where the training had 1e-6.
    """
    if name == entry.hf_id:
        return {}
    return {"norm_eps": entry.config.norm_eps, "init_values": entry.config.init_values}
