"""beit_fast: BEiT pre-training and backbones, built for throughput."""

from beit_fast.model.accelerate import accelerate, restore
from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table

__all__ = [
    "Beit",
    "BeitConfig",
    "BeitForImageClassification",
    "BeitForMaskedImageModeling",
    "accelerate",
    "beit_config",
    "resize_pos_embed",
    "resize_rel_pos_table",
    "restore",
]
