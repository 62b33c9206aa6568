"""Named runs of semantic segmentation. Each returns its whole configuration.

Numbers are those of unilm's configurations for ADE20K (spec 9.2), of its BEiT v2, and of the
paper's Table 14; mIoU is theirs, in percent, on ADE20K's 2,000 validation images at a single scale,
and none of these has been run by us yet. `data.batch_size` is per rank and micro-batch: ranks x
run.accumulate x data.batch_size is the global batch, 16. Rates are absolute, so keep that product:
with 2 images on one GPU 48.9 came of what gives 53.6 (unilm issue 443). Batch norm sees the images
of a micro-batch, on all ranks.

Training is in bf16 where the original has apex's fp16. ADE is the folder of ADEChallengeData2016;
its validation part is found there. Each starts from the weights it was published with, downloaded
if need be, but for BEiT v2's, to which the README of unilm's beit2 links; `--init` takes others.
LayerScale's start is the original's, and then the checkpoint's.
"""

from typing import Any

from beit_fast.data.views.config import SegmentationViewConfig
from beit_fast.model.config import VARIANTS, SegmenterConfig
from beit_fast.tasks.segment.config import SegmentationDataConfig, SegmentConfig
from beit_fast.train.config import OptimConfig, RunConfig

STEPS = 160_000
# Epochs: the original's 16,000 steps of 16 of the 20,210 images.
EVALUATE_EVERY = 12.67


def beit_plus_base_ade20k_512() -> SegmentConfig:
    """BEiT+ B, pre-trained on ImageNet-22K without labels, on ADE20K at 512 px.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast segment beit_plus_base_ade20k_512 --data.path ADE

    8 ranks x 2 images, 160,000 steps. unilm has the configuration and no mIoU for it.
    """
    return _ade20k(
        "beit_plus_base_ade20k_512",
        _model("base", drop_path_rate=0.1),
        lr=7e-4,
        layer_decay=0.65,
        init="beit_base_patch16_224_pt22k",
    )


def beit_plus_base_in22k_ade20k_512() -> SegmentConfig:
    """BEiT+ B, fine-tuned on ImageNet-22K, on ADE20K at 512 px.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast segment beit_plus_base_in22k_ade20k_512 --data.path ADE

    8 ranks x 2 images, 160,000 steps. unilm has the configuration and no mIoU for it; that at 640
    px has one.
    """
    return _ade20k(
        "beit_plus_base_in22k_ade20k_512",
        _model("base", drop_path_rate=0.1),
        lr=3e-5,
        layer_decay=0.9,
        init="beit_base_patch16_224_pt22k_ft22k",
    )


def beit_plus_base_in22k_ade20k_640() -> SegmentConfig:
    """BEiT+ B, fine-tuned on ImageNet-22K, on ADE20K at 640 px: 53.61 mIoU.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast segment beit_plus_base_in22k_ade20k_640 --data.path ADE

    8 ranks x 2 images, 160,000 steps. 53.61 and, with six scales and flips, 54.26 are of unilm's
    README; mmsegmentation's own runs gave 53.08 and 53.84 (its pull request 1404).
    """
    return _ade20k(
        "beit_plus_base_in22k_ade20k_640",
        _model("base", img_size=640, drop_path_rate=0.1),
        lr=3e-5,
        layer_decay=0.9,
        init="beit_base_patch16_224_pt22k_ft22k",
    )


def beit_plus_large_in22k_ade20k_512() -> SegmentConfig:
    """BEiT+ L, fine-tuned on ImageNet-22K, on ADE20K at 512 px.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast segment beit_plus_large_in22k_ade20k_512 --data.path ADE

    8 ranks x 2 images, 160,000 steps; with less memory `--grad_checkpointing selective`. unilm has
    the configuration and no mIoU for it; that at 640 px has one.
    """
    return _ade20k(
        "beit_plus_large_in22k_ade20k_512",
        _model("large", drop_path_rate=0.2, init_values=1e-6),
        lr=2e-5,
        layer_decay=0.95,
        init="beit_large_patch16_224_pt22k_ft22k",
    )


def beit_plus_large_in22k_ade20k_640() -> SegmentConfig:
    """BEiT+ L, fine-tuned on ImageNet-22K, on ADE20K at 640 px: 56.7 mIoU.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast segment beit_plus_large_in22k_ade20k_640 --data.path ADE

    8 ranks x 1 images x 2 micro-batches, 160,000 steps. 56.7 and, with six scales and flips, 57.0
    are of unilm's README; mmsegmentation's own runs gave 56.33 and 56.84 (its pull request 1404).
    The original counts micro-batches: 320,000, with a warm-up of 3,000.
    """
    return _ade20k(
        "beit_plus_large_in22k_ade20k_640",
        _model("large", img_size=640, drop_path_rate=0.2, init_values=1e-6),
        lr=2e-5,
        layer_decay=0.95,
        init="beit_large_patch16_224_pt22k_ft22k",
        batch_size=1,
        accumulate=2,
    )


def beit_base_ade20k_512() -> SegmentConfig:
    """BEiT-B of the paper's tables, pre-trained on ImageNet-1K, on ADE20K at 512 px.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast segment beit_base_ade20k_512 --data.path ADE

    8 ranks x 2 images, 160,000 steps. The settings of Table 14, with UPerNet: the paper has
    SETR-PUP's decoder there, and with it 45.6 (Table 3), so nothing is known to expect here.
    """
    return _ade20k(
        "beit_base_ade20k_512",
        _model("base", variant="_vanilla", drop_path_rate=0.1),
        lr=1e-3,
        layer_decay=0.65,
        init="beit_base_patch16_224_pt1k_800ep",
    )


def beit_v2_base_ade20k_512() -> SegmentConfig:
    """BEiT v2 B, pre-trained on ImageNet-1K, on ADE20K at 512 px: 53.1 mIoU.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast segment beit_v2_base_ade20k_512 --data.path ADE

    8 ranks x 2 images, 160,000 steps. The mIoU is of unilm's README of BEiT v2, whose weights
    beitv2_base_patch16_224_pt1k.pth are to be in the working folder, or elsewhere with `--init`.
    """
    return _ade20k(
        "beit_v2_base_ade20k_512",
        _model("base", drop_path_rate=0.15),
        lr=5e-5,
        layer_decay=0.75,
        init="beitv2_base_patch16_224_pt1k.pth",
    )


def beit_v2_base_in21k_ade20k_512() -> SegmentConfig:
    """BEiT v2 B, fine-tuned on ImageNet-21K, on ADE20K at 512 px: 53.5 mIoU.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast segment beit_v2_base_in21k_ade20k_512 --data.path ADE

    8 ranks x 2 images, 160,000 steps. The mIoU is of unilm's README of BEiT v2, whose weights
    beitv2_base_patch16_224_pt1k_ft21k.pth are to be in the working folder, or elsewhere with
    `--init`.
    """
    return _ade20k(
        "beit_v2_base_in21k_ade20k_512",
        _model("base", drop_path_rate=0.15),
        lr=5e-5,
        layer_decay=0.85,
        init="beitv2_base_patch16_224_pt1k_ft21k.pth",
    )


def beit_v2_large_ade20k_512() -> SegmentConfig:
    """BEiT v2 L, pre-trained on ImageNet-1K, on ADE20K at 512 px: 56.7 mIoU.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast segment beit_v2_large_ade20k_512 --data.path ADE

    8 ranks x 2 images, 160,000 steps. The mIoU is of unilm's README of BEiT v2, whose weights
    beitv2_large_patch16_224_pt1k.pth are to be in the working folder, or elsewhere with `--init`.
    """
    return _ade20k(
        "beit_v2_large_ade20k_512",
        _model("large", drop_path_rate=0.2, init_values=1e-6),
        lr=4e-5,
        layer_decay=0.9,
        init="beitv2_large_patch16_224_pt1k.pth",
    )


def beit_v2_large_in21k_ade20k_512() -> SegmentConfig:
    """BEiT v2 L, fine-tuned on ImageNet-21K, on ADE20K at 512 px: 57.54 mIoU.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast segment beit_v2_large_in21k_ade20k_512 --data.path ADE

    8 ranks x 2 images, 160,000 steps. The mIoU is of unilm's page on BEiT v2's segmentation, with
    mAcc 68.78 and aAcc 86.22; the weights beitv2_large_patch16_224_pt1k_ft21k.pth are to be in the
    working folder, or elsewhere with `--init`.
    """
    return _ade20k(
        "beit_v2_large_in21k_ade20k_512",
        _model("large", drop_path_rate=0.2, init_values=1e-6),
        lr=3e-5,
        layer_decay=0.9,
        init="beitv2_large_patch16_224_pt1k_ft21k.pth",
    )


def small_data() -> SegmentConfig:
    """BEiT+ B on your own images with masks, a few hundred of them, on one GPU.

    beit-fast segment small_data --data.path IMAGES --data.masks MASKS --data.held_out 0.2

    With images to test on: `--data.test` and `--data.test_masks` in place of `--data.held_out`.
    Not run by us yet.

    Starts from weights that have seen the labels of ImageNet-22K; `--init RUN` takes a pre-trained
    BEiT of yours, of any size. The settings that ADE20K has from these weights, with these reasons:
    16 images a step, because fewer cost mIoU there, in two micro-batches for one GPU's memory, so
    that batch norm sees half as many; 8,000 steps, a twentieth, for 300 images are a seventieth of
    ADE20K's and seen 400 times all the same; a warm-up of a twentieth of them, as the heads start
    anew; layer decay and drop path as they are, because they keep what few images teach from
    undoing what was pre-trained; averaged weights, because with few images the last ones are noisy.
    For a few dozen images `--freeze_encoder true`, or `--model.head linear` besides.
    """
    return SegmentConfig(
        model=_model("base", drop_path_rate=0.1, num_classes=0),
        data=SegmentationDataConfig(batch_size=8),
        optim=_poly(3e-5, warmup_steps=400),
        run=RunConfig(
            output="runs/segment_small_data",
            steps=8000,
            accumulate=2,
            ema_decay=0.999,
            evaluate_every=20,
            save_every=500,
        ),
        init="beit_base_patch16_224_pt22k_ft22k",
        layer_decay=0.9,
    )


def _ade20k(
    name: str,
    model: SegmenterConfig,
    *,
    lr: float,
    layer_decay: float,
    init: str,
    batch_size: int = 2,
    accumulate: int = 1,
) -> SegmentConfig:
    """What all have in common. Images are fitted into 4 x and 1 x the crop's side."""
    side = model.image_pixels[0]
    return SegmentConfig(
        model=model,
        data=SegmentationDataConfig(batch_size=batch_size),
        optim=_poly(lr, warmup_steps=1500),
        run=RunConfig(
            output=f"runs/segment_{name}",
            steps=STEPS,
            accumulate=accumulate,
            evaluate_every=EVALUATE_EVERY,
            save_every=4000,
        ),
        augment=SegmentationViewConfig(scale=(4 * side, side)),
        init=init,
        layer_decay=layer_decay,
    )


def _poly(lr: float, *, warmup_steps: int) -> OptimConfig:
    return OptimConfig(
        lr=lr, min_lr=0.0, schedule="poly", warmup_steps=warmup_steps, clip_grad=None
    )


def _model(size: str, *, variant: str = "", **fields: Any) -> SegmenterConfig:
    """UPerNet on an encoder that has a name."""
    named = {"use_rel_pos_bias": False} | VARIANTS[f"beit_{size}_patch16_512{variant}"]
    return SegmenterConfig(**named | fields)
