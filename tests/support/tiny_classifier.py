"""A classifier small enough to evaluate in no time, whose classes differ."""

import torch

from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForImageClassification

TINY_CLASSIFIER = BeitConfig(
    img_size=16,
    patch_size=8,
    embed_dim=16,
    depth=1,
    num_heads=2,
    use_rel_pos_bias=True,
    use_shared_rel_pos_bias=False,
    num_classes=7,
)


def tiny_classifier(config: BeitConfig = TINY_CLASSIFIER) -> BeitForImageClassification:
    torch.manual_seed(0)
    model = BeitForImageClassification(config)
    torch.nn.init.normal_(model.head.weight)  # else all classes score nearly the same
    torch.nn.init.normal_(model.blocks[0].attn.relative_position_bias_table)
    return model
