"""Segmenters for model.py: ours and transformers', on the same maps, images and labels.

transformers has no window that slides: ours slides its model too. It reads two blocks earlier and
computes as many; its heads have no dropout, so ours have none here.
"""

import types
from collections.abc import Callable

import torch
from peers_models import transformers_config
from torch import Tensor, nn

from beit_fast.model.config import VARIANTS, SegmenterConfig
from beit_fast.model.segmenter import BeitForSemanticSegmentation
from beit_fast.tasks.segment.config_evaluation import SlideConfig
from beit_fast.tasks.segment.sliding import slide_window

Loss = Callable[[Tensor, Tensor], Tensor]


class TransformersScores(nn.Module):
    """Its segmenter as what a window slides with: images to scores."""

    def __init__(self, model: nn.Module, config: SegmenterConfig) -> None:
        super().__init__()
        self.model = model
        self.config = types.SimpleNamespace(image_pixels=config.image_pixels)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def segmenter_config(size: str, img_size: int) -> SegmenterConfig:
    """ADE20K's 150 classes, a table of positions for each block."""
    fields = VARIANTS[f"beit_{size}_patch16_224"] | {"img_size": img_size, "drop_rate": 0.0}
    return SegmenterConfig(**fields)


def build_segmenter(name: str, config: SegmenterConfig) -> tuple[nn.Module, Loss]:
    """What gives scores, and the loss of images and labels by it."""
    if name == "ours":
        model = BeitForSemanticSegmentation(config)
        return model, lambda images, labels: model.loss(images, labels)[0]
    import transformers

    theirs = transformers_config(config, use_mask_token=False)
    theirs.out_indices = list(config.tapped)
    model = transformers.BeitForSemanticSegmentation(theirs)
    scores = TransformersScores(model, config)
    return scores, lambda images, labels: model(images, labels=labels).loss


def segmentation_labels(config: SegmenterConfig, num_images: int, device: str) -> Tensor:
    """A class for every pixel: of pixels that do not count the two take different means."""
    generator = torch.Generator().manual_seed(1)
    shape = (num_images, *config.image_pixels)
    return torch.randint(config.num_classes, shape, generator=generator).to(device)


def slide(model: nn.Module, config: SegmenterConfig, device: str) -> Callable[[], Tensor]:
    """A pass over one image of 1.5 x 2 windows: six of them, at once."""
    height, width = config.image_pixels
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(1, 3, height * 3 // 2, 2 * width, generator=generator).to(device)
    return lambda: slide_window(model, pixels, SlideConfig())
