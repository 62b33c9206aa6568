"""What only segmenters have: the heads that shapes and transformers' config.json state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from beit_fast.model.config import SegmenterConfig

# Of transformers' segmentation heads: what ours are, too; its defaults.
_HEADS = {
    "pool_scales": [1, 2, 3, 6],
    "auxiliary_num_convs": 1,
    "auxiliary_concat_input": False,
}


def fields_of_heads(state: Mapping[str, Tensor], embed_dim: int) -> dict[str, Any]:
    """What the shapes of a segmenter's heads say. Raises ValueError where they score no classes."""
    if "decode_head.conv_seg.weight" not in state:
        raise ValueError(
            "decode_head.conv_seg.weight, which scores the classes, is missing: pass the whole "
            "file, or take what begins with decode_head. out of it to read the encoder alone"
        )
    if "decode_head.bn.weight" in state:
        return {"head": "linear"}
    mixed = state.get("decode_head.fpn_bottleneck.conv.weight")
    auxiliary = state.get("auxiliary_head.convs.0.conv.weight")
    channels = len(mixed) if mixed is not None and mixed.ndim else embed_dim
    return {
        "head_channels": None if channels == embed_dim else channels,
        "auxiliary_channels": len(auxiliary) if auxiliary is not None and auxiliary.ndim else 0,
    }


def add_counters(state: dict[str, Tensor]) -> None:
    """Files older than torch 0.4.1 lack a batch norm's count of batches, which no result needs."""
    for name in [name for name in state if name.endswith(".running_var")]:
        counter = name.removesuffix("running_var") + "num_batches_tracked"
        state.setdefault(counter, torch.tensor(0))


def segmenter_fields_of_hf_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Those that SegmenterConfig adds; `out_indices` are the blocks that unilm calls so.

    Raises ValueError where the heads are others than ours.
    """
    for name, ours in _HEADS.items():
        theirs = hf.get(name, ours)
        if (list(theirs) if isinstance(theirs, tuple | list) else theirs) != ours:
            raise ValueError(f"config.json has {name} {theirs!r}: the heads here have {ours!r}")
    has_auxiliary = hf.get("use_auxiliary_head", True)
    fields: dict[str, Any] = {
        "auxiliary_channels": hf.get("auxiliary_channels", 256) if has_auxiliary else 0
    }
    # Early files have the second name.
    taps = hf.get("out_indices", hf.get("segmentation_indices"))
    if taps is not None:
        depth = hf.get("num_hidden_layers", 12)
        is_four = isinstance(taps, list | tuple) and len(taps) == 4
        if not is_four or not all(type(tap) is int and 0 <= tap < depth for tap in taps):
            raise ValueError(
                f"config.json has out_indices {taps!r:.80}, and blocks are 0 to {depth - 1}: write "
                "there the four blocks, from 0, that the heads were trained on"
            )
        fields["taps"] = tuple(taps)
    return fields


def segmenter_differs(config: SegmenterConfig) -> str:
    """What transformers' class makes of a segmenter that is not what we do; it always differs.

    Seen in transformers 5 `modeling_beit.py`: `hidden_states[i - 1]` for i of `out_indices`, where
    0 is what enters the first block; no dropout in the heads.
    """
    theirs = [max(tap - 2, -1) if tap else config.depth - 1 for tap in config.tapped]
    return (
        f"out_indices {list(config.tapped)} are the blocks, from 0, that the heads read, as unilm "
        f"counts; transformers' class reads blocks {theirs} for them (-1: what enters the first), "
        "so its outputs differ, and heads trained there want these as taps; nor has it dropout in "
        "its heads, or a window that slides"
    )


def hf_fields_of_segmenter(config: SegmenterConfig) -> dict[str, Any]:
    """What config.json says of a segmenter's heads. Raises ValueError where there are no such."""
    _check_head(config)
    return {
        **_HEADS,
        "out_indices": list(config.tapped),
        "use_auxiliary_head": config.auxiliary_channels > 0,
        "auxiliary_channels": config.auxiliary_channels or 256,
        "semantic_loss_ignore_index": 255,
    }


def _check_head(config: SegmenterConfig) -> None:
    """Raise ValueError where transformers has no such heads or pyramid."""
    if config.head != "upernet":
        raise ValueError(
            f"the head is {config.head!r}: transformers has a segmenter with UPerNet alone, use "
            "to='unilm', or save the encoder, Beit, alone"
        )
    if sorted(set(config.tapped)) != list(config.tapped):
        raise ValueError(
            f"taps {list(config.tapped)}: transformers wants four different blocks in rising "
            "order, use to='unilm'"
        )
    if config.upernet_channels != config.embed_dim:
        raise ValueError(
            f"head_channels is {config.head_channels}: transformers' head has embed_dim, "
            f"{config.embed_dim}, use to='unilm'"
        )
    if config.patch_pixels == (8, 8):
        raise ValueError(
            "patches of 8 pixels have unilm's pyramid for them, which transformers lacks: use "
            "to='unilm'"
        )
