"""transformers' config.json, read into a config's fields and written from one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from beit_fast.model.config import BeitConfig, SegmenterConfig
from beit_fast.weights.segmenters import hf_fields_of_segmenter, segmenter_differs


def fields_of_hf_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of BeitConfig that config.json states; {} where it is timm's, which states none.

    Raises ValueError where it is of another model, or of a BEiT that ours is not.
    """
    if "model_type" not in hf and str(hf.get("architecture", "")).startswith("beit"):
        return {}
    if hf.get("model_type") != "beit":
        kind = hf.get("model_type", hf.get("architecture"))
        raise ValueError(f"config.json is of a {kind!r}, not of a 'beit': pass a BEiT's folder")
    activation = hf.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ValueError(f"config.json has hidden_act {activation!r}: a BEiT here has gelu")
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    dropout = {rate: hf[rate] for rate in rates if hf.get(rate)}
    if dropout:
        raise ValueError(f"config.json has {dropout}: BEiT trains without dropout, set them to 0")
    # Left out of a file: transformers' defaults.
    fields = {
        "img_size": _size(hf.get("image_size", 224)),
        "patch_size": _size(hf.get("patch_size", 16)),
        "in_chans": hf.get("num_channels", 3),
        "embed_dim": hf.get("hidden_size", 768),
        "depth": hf.get("num_hidden_layers", 12),
        "num_heads": hf.get("num_attention_heads", 12),
        "norm_eps": hf.get("layer_norm_eps", 1e-12),
        "drop_path_rate": hf.get("drop_path_rate", 0.1),
        "use_abs_pos_emb": hf.get("use_absolute_position_embeddings", False),
        "use_rel_pos_bias": hf.get("use_relative_position_bias", False),
        "use_shared_rel_pos_bias": hf.get("use_shared_relative_position_bias", False),
        "global_pool": "avg" if hf.get("use_mean_pooling", True) else "token",
    }
    hidden = hf.get("intermediate_size", 3072)
    fields["mlp_ratio"] = mlp_ratio_of(hidden, fields["embed_dim"])
    scale = hf.get("layer_scale_init_value", 0.1)
    fields["init_values"] = scale if scale and scale > 0 else None
    return fields


def labels_of_hf_config(hf: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes in order; None where config.json has none, or only LABEL_0 and so on."""
    names = hf.get("id2label")
    if not isinstance(names, Mapping):
        return None
    try:
        labels = tuple(str(names[str(index)]) for index in range(len(names)))
    except KeyError as error:
        raise ValueError(
            f"config.json: id2label has no class {error}: number them from 0"
        ) from None
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(labels)) else labels


def hf_config_of(
    config: BeitConfig,
    task: str,
    *,
    labels: Sequence[str] | None = None,
    has_mask_token: bool = False,
) -> dict[str, Any]:
    """config.json for transformers: `task` as `Weights.task`.

    Raises ValueError where transformers' BEiT cannot be what `config` says.
    """
    if config.attn_head_dim is not None and config.head_dim * config.num_heads != config.embed_dim:
        raise ValueError(
            f"heads of {config.head_dim} channels, {config.num_heads} of them, for embed_dim "
            f"{config.embed_dim}: transformers' BEiT wants embed_dim / num_heads"
        )
    if task == "mim" and config.predict == "pixels":
        raise ValueError(
            "this model predicts pixels: transformers has no such BEiT, use to='unilm'"
        )
    classes = config.num_classes
    if labels is not None and len(labels) != classes:
        raise ValueError(f"{len(labels)} labels for {classes} classes: pass one for each")
    architecture = {
        "mim": "BeitForMaskedImageModeling",
        "classifier": "BeitForImageClassification",
        "segmentation": "BeitForSemanticSegmentation",
    }.get(task, "BeitModel")
    written = {
        "architectures": [architecture],
        "model_type": "beit",
        "image_size": _plain(config.img_size),
        "patch_size": _plain(config.patch_size),
        "num_channels": config.in_chans,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": config.drop_path_rate,
        "layer_scale_init_value": config.init_values or 0.0,
        "use_absolute_position_embeddings": config.use_abs_pos_emb,
        "use_relative_position_bias": config.use_rel_pos_bias,
        "use_shared_relative_position_bias": config.use_shared_rel_pos_bias,
        "use_mask_token": has_mask_token,
        # The norm of masked image modelling is beside the encoder; "token" would add one inside.
        "use_mean_pooling": task in ("mim", "segmentation") or config.global_pool == "avg",
        "vocab_size": config.vocab_size,
    }
    if not config.qkv_bias:
        written["qkv_bias"] = False  # ours: transformers keeps it, and has zeros there
    if task in ("classifier", "segmentation"):
        labels = labels or [f"LABEL_{index}" for index in range(classes)]
        written["id2label"] = {str(index): name for index, name in enumerate(labels)}
        written["label2id"] = {name: index for index, name in enumerate(labels)}
    if isinstance(config, SegmenterConfig) and task == "segmentation":
        written |= hf_fields_of_segmenter(config)
    return written


def transformers_differs(config: BeitConfig) -> tuple[str, ...]:
    """What transformers makes of a model of this config that is not what we do.

    Seen in transformers 5 `modeling_beit.py`: a table is laid out as (width, height) before it is
    resized, absolute positions as a square, and a pair as `patch_size` is divided by.
    """
    notes = (segmenter_differs(config),) if isinstance(config, SegmenterConfig) else ()
    (height, width), square_patch = config.image_pixels, len(set(config.patch_pixels)) == 1
    if not square_patch:
        notes += (
            f"transformers takes no patches of {config.patch_pixels} px: beit_fast reads these "
            "files, transformers raises TypeError",
        )
    elif config.grid[0] == config.grid[1]:
        pass
    elif config.use_rel_pos_bias or config.use_shared_rel_pos_bias:
        notes += (
            f"{height}x{width} px are not square: transformers reads the table of relative "
            "positions transposed there, so its outputs differ; beit_fast reads these files as "
            "they are meant",
        )
    elif config.use_abs_pos_emb:
        notes += (
            f"{height}x{width} px are not square: transformers takes positions for those of a "
            "square and moves them or raises RuntimeError; beit_fast reads these files as they "
            "are meant",
        )
    return notes


def mlp_ratio_of(hidden_dim: int, embed_dim: int) -> float:
    """The ratio whose product with `embed_dim` has `hidden_dim` as its whole part."""
    ratio = hidden_dim / embed_dim
    if int(embed_dim * ratio) == hidden_dim:
        return ratio
    return math.nextafter(ratio, math.inf)


def _size(value: Any) -> int | tuple[int, int]:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: int | tuple[int, int]) -> int | list[int]:
    return value if isinstance(value, int) else list(value)
