"""Tiny configurations, random weights, and the same weights under transformers' names."""

import re

import pytest
import torch

from beit_fast.model.config import BeitConfig

# Fields that make of `tiny` the first BEiT, and the one with a table for each block.
VANILLA = {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False, "init_values": None}
PER_BLOCK = {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}

# Names of transformers 5, applied in this order; q, k and v are split apart below.
TO_TRANSFORMERS = [
    (r"^(cls_token|mask_token)$", r"beit.embeddings.\1"),
    (r"^pos_embed$", "beit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "beit.embeddings.patch_embeddings.projection."),
    (r"^rel_pos_bias\.", "beit.shared_position_bias."),
    (r"^fc_norm\.", "beit.pooler.layernorm."),
    (r"^head\.", "classifier."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.attn\.(?=relative)", r"blocks.\1.relative_position_bias."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.attn\.(q|v)_bias", r"blocks.\1.attention.\2_proj.bias"),
    (r"^blocks\.(\d+)\.gamma_", r"blocks.\1.lambda_"),
    (r"^blocks\.(\d+)\.norm1\.", r"blocks.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"blocks.\1.layernorm_after."),
    (r"^blocks\.", "beit.layers."),
]  # fmt: skip


def assert_identical(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


def _to_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.weight", name):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"beit.layers.{match[1]}.attention.{part}_proj.weight"] = rows
            continue
        for pattern, replacement in TO_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def build_timm(config: BeitConfig):
    from timm.models.beit import Beit

    return Beit(
        img_size=config.img_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path_rate,
        init_values=config.init_values,
        use_abs_pos_emb=config.use_abs_pos_emb,
        use_rel_pos_bias=config.use_rel_pos_bias,
        use_shared_rel_pos_bias=config.use_shared_rel_pos_bias,
        num_classes=config.num_classes,
        global_pool=config.global_pool,
    )


def _transformers_config(config: BeitConfig):
    from transformers import BeitConfig as TransformersConfig

    return TransformersConfig(
        image_size=config.img_size,
        patch_size=config.patch_size,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=int(config.embed_dim * config.mlp_ratio),
        layer_norm_eps=config.norm_eps,
        layer_scale_init_value=config.init_values or 0.0,
        use_absolute_position_embeddings=config.use_abs_pos_emb,
        use_relative_position_bias=config.use_rel_pos_bias,
        use_shared_relative_position_bias=config.use_shared_rel_pos_bias,
        use_mean_pooling=config.global_pool == "avg",
        use_mask_token=True,
        vocab_size=config.vocab_size,
        num_labels=config.num_classes,
        drop_path_rate=0.0,
    )


@pytest.fixture
def tiny():
    """A config of 16 patches, 2 blocks and 32 channels, with fields replaced."""

    def make(**overrides) -> BeitConfig:
        fields = {
            "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4,
            "init_values": 0.1, "num_classes": 5, "vocab_size": 24,
        }  # fmt: skip
        return BeitConfig(**{**fields, **overrides})

    return make


@pytest.fixture
def randomize():
    """Fill every parameter with noise that makes each of them matter."""

    @torch.no_grad()
    def fill(model):
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        return model

    return fill


@pytest.fixture
def timm_beit():
    return build_timm


@pytest.fixture
def transformers_config():
    return _transformers_config


@pytest.fixture
def to_transformers():
    return _to_transformers


@pytest.fixture
def gradients():
    return lambda model: {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.fixture
def assert_agree():
    """Relative error <= 1e-5 of the largest element, tensor by tensor, over the same names."""

    def check(ours, theirs) -> None:
        if isinstance(ours, torch.Tensor):
            ours, theirs = {"output": ours}, {"output": theirs}
        assert ours.keys() == theirs.keys()
        for name in ours:
            error = (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()
            assert error <= 1e-5, f"{name}: {error:.2e}"

    return check
