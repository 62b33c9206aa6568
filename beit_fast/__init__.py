"""beit_fast: BEiT pre-training and backbones, built for throughput."""

from beit_fast.acceleration.patching import accelerate, restore
from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.pyramid import BeitFeaturePyramid
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table
from beit_fast.weights.convert import convert
from beit_fast.weights.load import from_pretrained, load_pretrained
from beit_fast.weights.published import PUBLISHED, published
from beit_fast.weights.save import push_to_hub, save_pretrained

__all__ = [
    "PUBLISHED",
    "Beit",
    "BeitConfig",
    "BeitFeaturePyramid",
    "BeitForImageClassification",
    "BeitForMaskedImageModeling",
    "accelerate",
    "beit_config",
    "convert",
    "from_pretrained",
    "load_pretrained",
    "published",
    "push_to_hub",
    "resize_pos_embed",
    "resize_rel_pos_table",
    "restore",
    "save_pretrained",
]
