"""Importing this gives timm the models called `beit_fast_*`.

    import timm
    import beit_fast.timm

    model = timm.create_model("beit_fast_base_patch16_224", num_classes=10, img_size=384)

They are timm's `beit_*` in weights, names, arguments and methods. What timm publishes for those is
what `pretrained=True` loads here, its positions resized as unilm does (`model/resize.py`) and not
as timm does.
"""

from beit_fast.timm.beit import CONFIGS, LEAVES, BeitForTimm, checkpoint_filter_fn

__all__ = ["CONFIGS", "LEAVES", "BeitForTimm", "checkpoint_filter_fn"]
