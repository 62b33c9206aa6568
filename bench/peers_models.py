"""A configuration of ours as timm's model, and as a configuration of transformers'."""

from torch import nn

from beit_fast.model.config import BeitConfig


def timm_beit(config: BeitConfig, num_classes: int) -> nn.Module:
    from timm.models.beit import Beit

    return Beit(
        img_size=config.img_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        init_values=config.init_values,
        drop_path_rate=config.drop_path_rate,
        use_abs_pos_emb=config.use_abs_pos_emb,
        use_rel_pos_bias=config.use_rel_pos_bias,
        use_shared_rel_pos_bias=config.use_shared_rel_pos_bias,
        num_classes=num_classes,
    )


def transformers_config(config: BeitConfig, use_mask_token: bool):
    import transformers

    return transformers.BeitConfig(
        image_size=config.img_size,
        patch_size=config.patch_size,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=int(config.embed_dim * config.mlp_ratio),
        layer_norm_eps=config.norm_eps,
        layer_scale_init_value=config.init_values or 0.0,
        drop_path_rate=config.drop_path_rate,
        use_absolute_position_embeddings=config.use_abs_pos_emb,
        use_relative_position_bias=config.use_rel_pos_bias,
        use_shared_relative_position_bias=config.use_shared_rel_pos_bias,
        use_mask_token=use_mask_token,
        vocab_size=config.vocab_size,
        num_labels=config.num_classes,
    )
