"""How weights start: as the original pre-trains, and as it fine-tunes what is not in a checkpoint.

Pre-training follows BERT's initialiser, a normal of 0.02 cut at one sigma (realised std 0.0108);
fine-tuning timm's, whose cut at +-2 never bites. In all, what is added to the residual stream by
block l (from 1) is divided by sqrt(2 l) (paper 2.4; unilm `fix_init_weight`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

STD = 0.02


@torch.no_grad()
def init_pretraining(model: nn.Module) -> None:
    """Every weight, token and position from N(0, 0.02) cut at +-0.02; biases and tables 0."""
    _init(model, lambda weight: nn.init.trunc_normal_(weight, std=STD, a=-STD, b=STD))
    proj = model.patch_embed.proj
    nn.init.trunc_normal_(proj.weight, std=STD, a=-STD, b=STD)
    nn.init.zeros_(proj.bias)


@torch.no_grad()
def init_finetuning(model: nn.Module) -> None:
    """Weights, token and positions from N(0, 0.02), the classifier's scaled down by 0.001.

    The patch embedding starts as torch's convolutions do.
    """
    _init(model, lambda weight: nn.init.trunc_normal_(weight, std=STD))
    model.patch_embed.proj.reset_parameters()
    if isinstance(model.head, nn.Linear):
        model.head.weight.mul_(0.001)


@torch.no_grad()
def init_segmentation(model: nn.Module) -> None:
    """The encoder as fine-tuning starts; heads as mmsegmentation's, all but their batch norms.

    Convolutions before a batch norm from N(0, 2 / fan_out) (mmcv `ConvModule`), the last ones from
    N(0, 0.01) with biases 0 (mmseg `BaseDecodeHead`).
    """
    _init(model, lambda weight: nn.init.trunc_normal_(weight, std=STD))
    model.patch_embed.proj.reset_parameters()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or name == "patch_embed.proj":
            continue
        if name.endswith("conv_seg"):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        else:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _init(model: nn.Module, draw: Callable[[Tensor], Tensor]) -> None:
    """All but the patch embedding and the scale of the head, buffers included.

    Buffers too, so that a model made on the meta device is whole after `to_empty` and this.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = name.rpartition(".")[2]
        if kind in ("cls_token", "mask_token", "pos_embed"):
            draw(tensor)
        elif kind in ("gamma_1", "gamma_2"):
            tensor.fill_(model.config.init_values)
        elif kind in ("q_bias", "k_bias", "v_bias", "relative_position_bias_table"):
            tensor.zero_()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for number, block in enumerate(model.blocks, start=1):
        block.attn.proj.weight.div_(math.sqrt(2 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2 * number))
