"""A segmenter small enough to slide over images in no time, whose classes differ."""

from dataclasses import asdict, replace

import torch
import torch.nn.functional as F

from beit_fast.model.config import SegmenterConfig
from beit_fast.model.segmenter import BeitForSemanticSegmentation
from beit_fast.train.state import save_checkpoint

TINY_SEGMENTER = SegmenterConfig(
    img_size=(32, 40),
    patch_size=4,
    embed_dim=16,
    depth=6,  # of which UPerNet reads four that differ
    num_heads=2,
    num_classes=3,
    auxiliary_channels=4,
)


def tiny_segmenter(**changes) -> BeitForSemanticSegmentation:
    torch.manual_seed(0)
    model = BeitForSemanticSegmentation(replace(TINY_SEGMENTER, **changes)).eval()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)  # else one class is everywhere
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    coarse = 2 * torch.rand(16, model.config.in_chans, 4, 4) - 1
    last = model.decode_head.conv_seg
    with torch.no_grad():  # every class has the largest score somewhere
        scores = model(F.interpolate(coarse, model.config.image_pixels))
        mean, std = scores.mean(dim=(0, 2, 3)), scores.std(dim=(0, 2, 3))
        last.weight /= std.view(-1, 1, 1, 1)
        last.bias.copy_((last.bias - mean) / std)
    return model


def save_run(folder, model, **settings):
    """A run of segmentation that ended after step 4; its average has other biases."""
    state = model.state_dict()
    bias = "decode_head.conv_seg.bias"
    weights = {"model": state, "ema": state | {bias: state[bias] + torch.tensor([9.0, 0, 0])}}
    save_checkpoint(folder, 4, weights, {"model": asdict(model.config), **settings}, keep=1)
    return folder
