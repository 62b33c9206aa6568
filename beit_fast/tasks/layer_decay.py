"""Layer-wise learning rates: early layers, which pre-training has finished, move little.

    scale(id) = decay^(depth + 1 - id)
    id   0          patch embedding, [CLS], mask token, positions
         k + 1      block k, with its own relative-position table
         depth + 1  the rest: norms, heads, pyramid, and the table that blocks share

Own code because timm's `param_groups_layer_decay` sorts by `group_matcher`, which puts the shared
table with the embeddings; unilm gives it the head's rate.

Source: unilm beit `optim_factory.py` (spec 7.2), and for segmentation its
`layer_decay_optimizer_constructor.py` (spec 9.2)
"""

from typing import Any

from torch import nn

TABLE = "relative_position_bias_table"
EMBEDDINGS = ("cls_token", "mask_token", "pos_embed", "patch_embed")


def layer_id(name: str, depth: int) -> int:
    """The layer of the parameter of this name, 0 to depth + 1."""
    part, *rest = name.split(".")
    if part in EMBEDDINGS:
        return 0
    return int(rest[0]) + 1 if part == "blocks" else depth + 1


def spared_from_decay(model: nn.Module, *, spare_tables: bool) -> set[str]:
    """Names of the parameters that are not decayed though they have several axes.

    Positions and [CLS], but for a segmenter's; the mask token and the relative-position tables are
    decayed as in the original, where `disable_weight_decay_on_rel_pos_bias` is `spare_tables`.
    """
    names = set(model.no_weight_decay())
    if spare_tables:
        names |= {n for n, _ in model.named_parameters() if n.endswith(TABLE)}
    return names


def layer_decay_groups(
    model: nn.Module, weight_decay: float, layer_decay: float, *, spare_tables: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW with `lr_scale`, one for each layer and kind, by layer.

    Not decayed: what has one axis, and `spared_from_decay`. `name` says layer and kind.
    """
    depth, spared = len(model.blocks), spared_from_decay(model, spare_tables=spare_tables)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decays = layer_id(name, depth), parameter.ndim > 1 and name not in spared
        new = {
            "name": f"layer_{layer}_{'decay' if decays else 'no_decay'}",
            "params": [],
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": layer_decay ** (depth + 1 - layer),
        }
        groups.setdefault((layer, decays), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
