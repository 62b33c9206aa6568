import dataclasses

import pytest

from beit_fast.model.config import VARIANTS, BeitConfig, beit_config


def test_grid_counts_patches_down_and_across():
    config = BeitConfig(img_size=(32, 64), patch_size=(8, 16))
    assert config.grid == (4, 4)
    assert BeitConfig(img_size=(32, 64), patch_size=8).grid == (4, 8)
    assert BeitConfig(img_size=(32, 64), patch_size=8).num_patches == 32
    assert config.patch_dim == 3 * 8 * 16


def test_every_variant_has_the_size_its_name_says():
    for name in VARIANTS:
        config = beit_config(name)
        size, _, pixels = name.split("_")[1:4]
        depth, width, heads = {
            "small": (12, 384, 6), "base": (12, 768, 12), "large": (24, 1024, 16)
        }[size]  # fmt: skip
        assert (config.depth, config.embed_dim, config.num_heads) == (depth, width, heads)
        assert config.img_size == int(pixels)
        assert config.head_dim == 64
        vanilla = name.endswith("_vanilla")
        assert config.use_abs_pos_emb == (config.init_values is None) == vanilla
        assert config.use_shared_rel_pos_bias == name.endswith("_8k_vocab")
        assert config.use_rel_pos_bias == name.endswith(pixels)


def test_layer_scale_starts_smaller_in_large():
    assert beit_config("beit_base_patch16_224").init_values == 0.1
    assert beit_config("beit_large_patch16_224").init_values == 1e-5


def test_overrides_replace_fields_of_a_variant():
    config = beit_config("beit_base_patch16_224", depth=3)
    assert config == dataclasses.replace(beit_config("beit_base_patch16_224"), depth=3)
    assert config.depth == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"img_size": 225}, r"225x225 pixels.*16x16: pass img_size=\(224, 224\)"),
        ({"img_size": (224, 100)}, r"pass img_size=\(224, 96\)"),
        ({"img_size": 8}, r"pass img_size=\(16, 16\)"),
        ({"patch_size": 0}, "patch_size is 0: give a whole number, at least 1"),
        ({"num_heads": 7}, "embed_dim 768 does not divide into num_heads 7"),
        ({"num_heads": 0}, "num_heads is 0: give a whole number, at least 1"),
        ({"depth": 0}, "depth is 0: give a whole number, at least 1"),
        ({"attn_head_dim": 0}, "attn_head_dim is 0: give a whole number, at least 1, or null"),
        ({"drop_path_rate": 1.0}, "give a finite number, at least 0 and below 1"),
        ({"init_values": -1.0}, "give a finite number, at least 0, or null"),
        ({"mlp_ratio": 1e-4}, "mlp_ratio is 0.0001, which leaves an MLP no channel"),
        ({"mlp_ratio": 1e30}, "mlp_ratio is 1e.30, with embed_dim 768 more channels than"),
        ({"global_pool": "max"}, "give avg, token or ''"),
        ({"predict": "depth"}, "give tokens or pixels"),
    ],
)
def test_combinations_that_make_no_model_are_refused_with_a_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        BeitConfig(**fields)


def test_an_unknown_variant_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="beit_base_patch16_224_8k_vocab"):
        beit_config("beit_huge")


def test_another_head_width_frees_the_number_of_heads():
    assert BeitConfig(num_heads=7, attn_head_dim=32).head_dim == 32
