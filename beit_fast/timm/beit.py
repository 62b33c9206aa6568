"""The models called `beit_fast_*`: their class, weights and registration.

The module has the name of timm's because that is how timm's tests know which models have
intermediates: `FEAT_INTER_FILTERS` lists names of modules.
"""

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._input import update_model_args, update_model_input_size
from timm.models.beit import Beit as TimmBeit
from torch import Tensor, fx, nn

from beit_fast.kernels.attention.rel_pos_bias import relative_position_rows
from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.model.fused import FusedBlock
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.model.layers import RelativePositionBias
from beit_fast.model.patch_embed import PatchEmbed
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table
from beit_fast.weights.layouts import to_house
from beit_fast.weights.published import PUBLISHED

# Their kernels are no graph of torch.fx. timm's tracer knows them from here, others are told.
LEAVES: list[type[nn.Module]] = [FusedBlock, PatchEmbed, RelativePositionBias]
for leaf in LEAVES:
    register_notrace_module(leaf)

# Arguments of timm's Beit that have no counterpart here, and the only value they may have.
FIXED = {
    "swiglu_mlp": False,
    "scale_mlp": False,
    "pos_drop_rate": 0.0,
    "proj_drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "head_init_scale": 0.001,
}


class UnknownPooling(AssertionError, ValueError):
    """timm asserts that a model has the pooling it is asked for; this package raises ValueError."""


class BeitForTimm(BeitForImageClassification):
    """BeitForImageClassification as timm makes it, and what only timm asks of a model."""

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """options: those of timm's `Beit`, or fields of BeitConfig.

        Raises TypeError for an unknown one, UnknownPooling for a pooling and ValueError for any
        other value that this model cannot have.
        """
        for name in BeitConfig.REMOVED.keys() & options.keys():
            if (value := options.pop(name)) != BeitConfig.REMOVED[name]:
                raise ValueError(
                    f"{name} is {value!r}, and there is no {name} any more: leave it out"
                )
        known = {field.name for field in fields(BeitConfig)}
        if unknown := sorted(options.keys() - known - FIXED.keys()):
            raise TypeError(f"BeitForTimm takes no {', '.join(unknown)}: leave it out")
        for name in FIXED.keys() & options.keys():
            if (value := options.pop(name)) != FIXED[name]:
                raise ValueError(
                    f"{name} is {value!r}: a beit_fast model has {FIXED[name]!r}, for others "
                    "create timm's own beit model and call beit_fast.accelerate on it"
                )
        _check_pooling(options.get("global_pool"))
        for name in {"img_size", "patch_size"} & options.keys():
            if isinstance(options[name], list):  # from config.json
                options[name] = tuple(options[name])
        with torch.device(device) if device is not None else nullcontext():
            super().__init__(BeitConfig(**options))
        self.to(dtype=dtype)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().set_input_size(img_size, patch_size)
        update_model_input_size(self, self.config.image_pixels)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        _check_pooling(global_pool)
        super().reset_classifier(num_classes, global_pool)
        if global_pool is not None:
            update_model_args(self, use_fc_norm=self.config.use_fc_norm)

    def _run(self, blocks: nn.ModuleList, images: Tensor | fx.Proxy, *rest: Any, **options: Any):
        """For torch.fx: the sequence, and blocks that are leaves of the graph."""
        if not isinstance(images, fx.Proxy):
            return super()._run(blocks, images, *rest, **options)
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x if self.pos_embed is None else x + self.pos_embed
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for block in blocks:
            x = block(x, bias)
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script, which cannot look into operators: timm's model around the same
        parameters. It computes the same, without the kernels."""
        config = self.config
        same = (
            *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim"),
            *("depth", "num_heads", "qkv_bias", "mlp_ratio", "drop_rate", "drop_path_rate"),
            *("init_values", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"),
        )
        model = TimmBeit(
            **{name: getattr(config, name) for name in same},
            use_fc_norm=config.norm_follows_pooling,
            norm_layer=functools.partial(LayerNorm, eps=config.norm_eps),
        )
        for name, parameter in self.named_parameters():
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
        return model.to(self.cls_token.device).train(self.training)


def _check_pooling(global_pool: str | None) -> None:
    if global_pool not in (None, "avg", "token", ""):
        raise UnknownPooling(f"global_pool is {global_pool!r}: pass 'avg', 'token' or ''")


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: BeitForTimm) -> dict[str, Tensor]:
    """Weights under the model's names, with its positions for its grid.

    state: of timm, unilm or transformers, also inside "model" or "module". Positions that have the
    model's shape are taken as they are. Others are of the grid that `pretrained_cfg["input_size"]`
    gives, or of a square one. Raises ValueError where they are of neither.
    """
    state, _ = to_house(state.get("model", state.get("module", state)))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    grid, fitted = model.config.grid, {}
    for name, tensor in state.items():
        if tensor.shape != shapes.get(name):
            if name.endswith("relative_position_bias_table"):
                source = _source_grid(name, tensor, len(tensor), relative_position_rows, model)
                tensor = resize_rel_pos_table(tensor, source, grid)
            elif name == "pos_embed":
                source = _source_grid(name, tensor, tensor.shape[1], _num_tokens, model)
                tensor = resize_pos_embed(tensor, source, grid)
        fitted[name] = tensor
    return fitted


def _num_tokens(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1] + 1


def _source_grid(
    name: str,
    tensor: Tensor,
    rows: int,
    rows_of: Callable[[tuple[int, int]], int],
    model: BeitForTimm,
) -> tuple[int, int]:
    """The grid that so many rows of positions were trained on; `rows_of` counts a grid's."""
    grids = [(side, side) for side in range(1, math.isqrt(rows) + 1)]
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if stated is not None:
        height, width = model.config.patch_pixels
        grids.insert(0, (stated[1] // height, stated[2] // width))
    found = next((grid for grid in grids if rows_of(grid) == rows), None)
    if found is None:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)}: neither of this model's grid, "
            f"{model.config.grid[0]}x{model.config.grid[1]}, nor of a square one, nor of the "
            f"images that pretrained_cfg states, {stated}: say what they were, "
            "pretrained_cfg_overlay={'input_size': (3, height, width), ...}"
        )
    return found


def _create(variant: str, pretrained: bool, config: BeitConfig, **options: Any) -> nn.Module:
    """What timm's `create_model` asks for, from the fields of `config` and what it was given."""
    default = BeitConfig()
    changed = {
        field.name: getattr(config, field.name)
        for field in fields(BeitConfig)
        if getattr(config, field.name) != getattr(default, field.name)
    }
    return build_model_with_cfg(
        BeitForTimm,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **{**changed, **options},
    )


def _cfg(pixels: int, **options: Any) -> dict[str, Any]:
    """timm's description of weights, or of none, and of the images that they want."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, pixels, pixels),
        "pool_size": None,
        "crop_pct": 0.9 if pixels < 384 else 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        **options,
    }


# A table of positions for each block, as the published classifiers have, and the paper's plain ViT.
TEST = {"embed_dim": 64, "depth": 6, "num_heads": 2, "mlp_ratio": 3.0, "img_size": 160}
CONFIGS: dict[str, BeitConfig] = {
    f"beit_fast_{size}_patch16_{pixels}{suffix}": beit_config(
        f"beit_{size}_patch16_{pixels}{suffix}"
    )
    for size in ("small", "base", "large")
    for pixels in (224, 384, 512)
    for suffix in ("", "_vanilla")
} | {
    "beit_fast_test_patch16_160": beit_config("beit_small_patch16_224", **TEST),
    "beit_fast_test_patch16_160_vanilla": beit_config("beit_small_patch16_224_vanilla", **TEST),
}


def _pretrained_cfgs() -> dict[str, dict[str, Any]]:
    found = {}
    for entry in PUBLISHED.values():
        if entry.timm_id is None:
            continue
        found[f"beit_fast_{entry.timm_id.removeprefix('beit_')}"] = _cfg(
            entry.config.image_pixels[0],
            hf_hub_id=f"timm/{entry.timm_id}",
            num_classes=entry.num_classes,
            crop_pct=entry.crop_pct,
            interpolation=entry.interpolation,
            mean=entry.mean,
            std=entry.std,
        )
    known = {name.partition(".")[0] for name in found}
    blank = {
        name: _cfg(config.image_pixels[0]) for name, config in CONFIGS.items() if name not in known
    }
    return found | blank


default_cfgs = generate_default_cfgs(_pretrained_cfgs())


def _register(name: str, config: BeitConfig) -> None:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create(name, pretrained, config, **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"BEiT of {config.depth} blocks of {config.embed_dim}, {config.img_size} px."
    globals()[name] = register_model(create)


for _name, _config in CONFIGS.items():
    _register(_name, _config)
