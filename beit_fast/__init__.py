"""beit_fast: BEiT pre-training and backbones, built for throughput.

The table of contents. Importing the package imports none of it, for torch takes seconds and neither
`beit-fast --help` nor the kernels need the rest. The first name asked for brings them all and
registers the operators, torch.ops.beit_fast; but those that need no torch come without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beit_fast.acceleration.patching import accelerate, restore
    from beit_fast.model.beit import Beit
    from beit_fast.model.config import BeitConfig, SegmenterConfig, beit_config
    from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
    from beit_fast.model.pyramid import BeitFeaturePyramid
    from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table
    from beit_fast.model.segmenter import BeitForSemanticSegmentation
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
    "BeitForSemanticSegmentation",
    "SegmenterConfig",
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

_NAMES = {  # by the module they are in, as above
    "acceleration.patching": ("accelerate", "restore"),
    "model.beit": ("Beit",),
    "model.config": ("BeitConfig", "SegmenterConfig", "beit_config"),
    "model.heads": ("BeitForImageClassification", "BeitForMaskedImageModeling"),
    "model.pyramid": ("BeitFeaturePyramid",),
    "model.resize": ("resize_pos_embed", "resize_rel_pos_table"),
    "model.segmenter": ("BeitForSemanticSegmentation",),
    "weights.convert": ("convert",),
    "weights.load": ("from_pretrained", "load_pretrained"),
    "weights.published": ("PUBLISHED", "published"),
    "weights.save": ("push_to_hub", "save_pretrained"),
}
_WITHOUT_TORCH = ("model.config", "weights.published")
# After `import beit_fast`, beit_fast.model.layers and the like are there as well.
_ROOMS = ("acceleration", "kernels", "model", "weights")


def __getattr__(name: str) -> Any:
    if name not in (*__all__, *_ROOMS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    alone = [module for module in _WITHOUT_TORCH if name in _NAMES[module]]
    for module in alone or _NAMES:
        found = importlib.import_module(f"{__name__}.{module}")
        for each in _NAMES[module]:
            globals().setdefault(each, getattr(found, each))  # what a user put here stays
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
