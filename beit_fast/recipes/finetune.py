"""Named fine-tuning runs for classification. Each returns its whole configuration.

Numbers are those of unilm's README and scripts and of the paper (spec 7.1); top-1 is theirs, on the
test images, and none of these has been run by us yet. `data.batch_size` is per rank and
micro-batch: ranks x run.accumulate x data.batch_size is the global batch, 1024 for most. Rates are
absolute, so keep that product. Mixup and CutMix pair the images of a micro-batch.

Each starts from the weights it was published with, downloaded if need be; `--init` takes others.
"""

from dataclasses import replace

from beit_fast.data.views.config import AugmentConfig
from beit_fast.model.config import beit_config
from beit_fast.tasks.finetune.config import FinetuneConfig, LabelledDataConfig
from beit_fast.train.config import OptimConfig, RunConfig

IN22K_CLASSES = 21_841
UNMIXED = AugmentConfig(mixup=0.0, cutmix=0.0)


def beit_plus_base_in1k() -> FinetuneConfig:
    """BEiT+ B, pre-trained on ImageNet-22K, on ImageNet-1K, 100 epochs: 83.7 % top-1.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast finetune beit_plus_base_in1k --init RUN --data.path TRAIN --data.test VAL

    8 ranks x 128 images.
    """
    return FinetuneConfig(
        model=beit_config("beit_base_patch16_224", drop_path_rate=0.1),
        data=LabelledDataConfig(batch_size=128),
        optim=OptimConfig(lr=4e-3, min_lr=1e-6, warmup_epochs=20, clip_grad=None),
        run=RunConfig(output="runs/finetune_beit_plus_base_in1k", epochs=100, evaluate_every=1),
        init="beit_base_patch16_224_pt22k",
        layer_decay=0.65,
    )


def beit_plus_large_in1k() -> FinetuneConfig:
    """BEiT+ L, pre-trained on ImageNet-22K, on ImageNet-1K, 50 epochs: 86.0 % top-1.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast finetune beit_plus_large_in1k --init RUN --data.path TRAIN --data.test VAL

    8 ranks x 64 images x 2 micro-batches.
    """
    return FinetuneConfig(
        model=beit_config("beit_large_patch16_224", drop_path_rate=0.2),
        data=LabelledDataConfig(batch_size=64),
        optim=OptimConfig(lr=1e-3, min_lr=1e-6, warmup_epochs=5, clip_grad=None),
        run=RunConfig(
            output="runs/finetune_beit_plus_large_in1k", epochs=50, evaluate_every=1, accumulate=2
        ),
        init="beit_large_patch16_224_pt22k",
        layer_decay=0.75,
    )


def beit_plus_base_in22k() -> FinetuneConfig:
    """BEiT+ B on ImageNet-22K with its labels, 90 epochs: the intermediate step.

    torchrun --nproc_per_node=16 --no-python \\
        beit-fast finetune beit_plus_base_in22k --init RUN --data.path TRAIN

    16 ranks x 256 images = 4096. unilm's command clips at 3.0, which its DeepSpeed ignores: so no
    clipping here.
    """
    return FinetuneConfig(
        model=beit_config("beit_base_patch16_224", drop_path_rate=0.1, num_classes=IN22K_CLASSES),
        data=LabelledDataConfig(batch_size=256),
        optim=OptimConfig(lr=3e-3, min_lr=1e-6, warmup_epochs=5, clip_grad=None),
        run=RunConfig(output="runs/finetune_beit_plus_base_in22k", epochs=90),
        init="beit_base_patch16_224_pt22k",
        augment=UNMIXED,
        layer_decay=0.65,
    )


def beit_plus_large_in22k() -> FinetuneConfig:
    """BEiT+ L on ImageNet-22K with its labels, 90 epochs: the intermediate step.

    torchrun --nproc_per_node=16 --no-python \\
        beit-fast finetune beit_plus_large_in22k --init RUN --data.path TRAIN

    16 ranks x 64 images x 2 micro-batches = 2048. No clipping, as for Base.
    """
    return FinetuneConfig(
        model=beit_config("beit_large_patch16_224", drop_path_rate=0.2, num_classes=IN22K_CLASSES),
        data=LabelledDataConfig(batch_size=64),
        optim=OptimConfig(lr=2e-3, min_lr=1e-6, warmup_epochs=5, clip_grad=None),
        run=RunConfig(output="runs/finetune_beit_plus_large_in22k", epochs=90, accumulate=2),
        init="beit_large_patch16_224_pt22k",
        augment=UNMIXED,
        layer_decay=0.75,
    )


def beit_plus_base_in22k_in1k() -> FinetuneConfig:
    """BEiT+ B, fine-tuned on ImageNet-22K, on ImageNet-1K, 30 epochs: 85.2 % top-1.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast finetune beit_plus_base_in22k_in1k --init RUN --data.path TRAIN --data.test VAL

    8 ranks x 64 images = 512. A head of other classes starts anew.
    """
    return FinetuneConfig(
        model=beit_config("beit_base_patch16_224", drop_path_rate=0.1),
        data=LabelledDataConfig(batch_size=64),
        optim=OptimConfig(lr=2e-5, min_lr=1e-6, warmup_epochs=5, weight_decay=1e-8, clip_grad=None),
        run=RunConfig(
            output="runs/finetune_beit_plus_base_in22k_in1k", epochs=30, evaluate_every=1
        ),
        init="beit_base_patch16_224_pt22k_ft22k",
        augment=UNMIXED,
        layer_decay=0.85,
    )


def beit_plus_large_in22k_in1k() -> FinetuneConfig:
    """BEiT+ L, fine-tuned on ImageNet-22K, on ImageNet-1K, 30 epochs: 87.4 % top-1.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast finetune beit_plus_large_in22k_in1k --init RUN --data.path TRAIN --data.test VAL

    8 ranks x 32 images x 2 micro-batches = 512.
    """
    return FinetuneConfig(
        model=beit_config("beit_large_patch16_224", drop_path_rate=0.4),
        data=LabelledDataConfig(batch_size=32),
        optim=OptimConfig(lr=2e-5, min_lr=1e-6, warmup_epochs=5, weight_decay=1e-8, clip_grad=None),
        run=RunConfig(
            output="runs/finetune_beit_plus_large_in22k_in1k",
            epochs=30,
            evaluate_every=1,
            accumulate=2,
        ),
        init="beit_large_patch16_224_pt22k_ft22k",
        augment=UNMIXED,
        layer_decay=0.90,
    )


def beit_plus_base_in22k_in1k_384() -> FinetuneConfig:
    """BEiT+ B, fine-tuned on ImageNet-22K at 224 px, on ImageNet-1K at 384: 86.8 % top-1.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast finetune beit_plus_base_in22k_in1k_384 --init RUN --data.path TRAIN \\
        --data.test VAL

    8 ranks x 64 images = 512; relative positions are resized as unilm does.
    """
    return _at(384, beit_plus_base_in22k_in1k())


def beit_plus_large_in22k_in1k_384() -> FinetuneConfig:
    """BEiT+ L, fine-tuned on ImageNet-22K at 224 px, on ImageNet-1K at 384: 88.4 % top-1.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast finetune beit_plus_large_in22k_in1k_384 --init RUN --data.path TRAIN \\
        --data.test VAL

    8 ranks x 32 images x 2 micro-batches = 512.
    """
    return _at(384, beit_plus_large_in22k_in1k())


def beit_plus_large_in22k_in1k_512() -> FinetuneConfig:
    """BEiT+ L, fine-tuned on ImageNet-22K at 224 px, on ImageNet-1K at 512: 88.6 % top-1.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast finetune beit_plus_large_in22k_in1k_512 --init RUN --data.path TRAIN \\
        --data.test VAL

    8 ranks x 32 images x 2 micro-batches = 512; with less memory `--grad_checkpointing selective`.
    """
    return _at(512, beit_plus_large_in22k_in1k())


def beit_base_in1k() -> FinetuneConfig:
    """BEiT-B of the paper's tables, pre-trained on ImageNet-1K, on ImageNet-1K: 83.2 % top-1.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast finetune beit_base_in1k --init RUN --data.path TRAIN --data.test VAL

    8 ranks x 128 images, 100 epochs. The paper tries rates of 2, 3, 4 and 5e-3 and repeats
    augmentation, which its code does not.
    """
    return FinetuneConfig(
        model=beit_config("beit_base_patch16_224_vanilla", drop_path_rate=0.1),
        data=LabelledDataConfig(batch_size=128),
        optim=OptimConfig(lr=4e-3, min_lr=1e-6, warmup_epochs=20, clip_grad=None),
        run=RunConfig(output="runs/finetune_beit_base_in1k", epochs=100, evaluate_every=1),
        init="beit_base_patch16_224_pt1k_800ep",
        layer_decay=0.65,
        statistics="imagenet",
    )


def beit_large_in1k() -> FinetuneConfig:
    """BEiT-L of the paper's tables, pre-trained on ImageNet-1K, on ImageNet-1K: 85.2 % top-1.

    torchrun --nproc_per_node=8 --no-python \\
        beit-fast finetune beit_large_in1k --init RUN --data.path TRAIN --data.test VAL

    8 ranks x 64 images x 2 micro-batches, 50 epochs. No such weights are published: RUN is that of
    `beit-fast pretrain beit_large_in1k`. The paper tries rates of 2, 3, 4 and 5e-3.
    """
    return FinetuneConfig(
        model=beit_config("beit_large_patch16_224_vanilla", drop_path_rate=0.1),
        data=LabelledDataConfig(batch_size=64),
        optim=OptimConfig(lr=3e-3, min_lr=1e-6, warmup_epochs=5, clip_grad=None),
        run=RunConfig(
            output="runs/finetune_beit_large_in1k", epochs=50, evaluate_every=1, accumulate=2
        ),
        init="runs/beit_large_in1k",
        layer_decay=0.75,
        statistics="imagenet",
    )


def beit_base_cifar100() -> FinetuneConfig:
    """BEiT-B of the paper's tables on CIFAR-100, 150 epochs: 90.1 % top-1.

    torchrun --nproc_per_node=4 --no-python \\
        beit-fast finetune beit_base_cifar100 --init RUN --data.path TRAIN --data.test TEST

    4 ranks x 128 images = 512; the data as images in class folders, enlarged to 224 px. The paper
    tries rates of 2, 3, 4 and 5e-3 and repeats augmentation, which its code does not.
    """
    return FinetuneConfig(
        model=beit_config("beit_base_patch16_224_vanilla", drop_path_rate=0.1, num_classes=100),
        data=LabelledDataConfig(batch_size=128),
        optim=OptimConfig(lr=3e-3, min_lr=1e-6, warmup_epochs=20, weight_decay=0.3, clip_grad=None),
        run=RunConfig(output="runs/finetune_beit_base_cifar100", epochs=150, evaluate_every=1),
        init="beit_base_patch16_224_pt1k_800ep",
        augment=AugmentConfig(erase=0.0),
        layer_decay=0.65,
        statistics="imagenet",
    )


def small_data() -> FinetuneConfig:
    """BEiT+ B on your own class folders of some thousand images, on one GPU.

    beit-fast finetune small_data --data.path TRAIN --data.test TEST

    With one folder alone: `--data.held_out 0.2` in place of `--data.test`. Not run by us yet.

    Starts from weights that have seen the labels of ImageNet-22K, for few labels teach little;
    `--init RUN` takes a pre-trained BEiT of yours, of any size. The settings of ImageNet-1K from
    MIM weights, with these reasons: small batches, for 3,000 images make 47 steps an epoch of them
    and the head needs some thousand; the rate in proportion to the batch; layer decay, drop path
    and mixing as they are, because they keep what is learnt on few images from undoing what was
    pre-trained; averaged weights, because with few images the last ones are noisy.
    """
    return FinetuneConfig(
        model=beit_config("beit_base_patch16_224", drop_path_rate=0.1, num_classes=0),
        data=LabelledDataConfig(batch_size=64),
        optim=OptimConfig(lr=2.5e-4, min_lr=1e-6, warmup_epochs=10, clip_grad=None),
        run=RunConfig(
            output="runs/finetune_small_data",
            epochs=100,
            evaluate_every=5,
            ema_decay=0.999,
            save_every=500,
        ),
        init="beit_base_patch16_224_pt22k_ft22k",
        layer_decay=0.65,
    )


def _at(pixels: int, config: FinetuneConfig) -> FinetuneConfig:
    """The recipe at another size of images."""
    output = f"{config.run.output}_{pixels}"
    return replace(
        config,
        model=replace(config.model, img_size=pixels),
        run=replace(config.run, output=output),
    )
