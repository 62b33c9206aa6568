"""Named runs. Each returns its whole configuration; a variation is `dataclasses.replace`.

Numbers are those of the paper's Table 12 and of unilm's README (spec 6). `data.batch_size` is per
rank and micro-batch: ranks x run.accumulate x data.batch_size is the global batch, 2048 for the
published recipes whatever the split. Rates are absolute, so keep that product.
"""

import functools
from collections.abc import Callable

from beit_fast.data.masking import MaskingConfig
from beit_fast.data.single_view import SingleViewConfig
from beit_fast.data.views import ViewConfig
from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.recipes_digits import digits, probe_digits, tokenizer_digits
from beit_fast.tasks.dvae import DvaeTrainingConfig
from beit_fast.tasks.pretokenize import PretokenizeConfig
from beit_fast.tasks.pretrain import PretrainConfig
from beit_fast.tasks.probe import ProbeConfig
from beit_fast.tasks.sources import PHOTOGRAPHS, DataConfig
from beit_fast.tokenizer.dvae import DvaeConfig
from beit_fast.tokenizer.loss import CosineSchedule
from beit_fast.train.config import OptimConfig, RunConfig

DALLE = "dalle.safetensors"  # write it with `beit-fast convert-dalle`


def beit_base_in1k() -> PretrainConfig:
    """BEiT-B on ImageNet-1K, 800 epochs: the vanilla ViT of the paper's tables.

    torchrun --nproc_per_node=16 --no-python \\
        beit-fast pretrain beit_base_in1k --data.path TRAIN

    16 ranks x 128 images. Paper: 83.2 % top-1 after fine-tuning; about five days on 16 V100.
    """
    return PretrainConfig(
        model=beit_config(
            "beit_base_patch16_224_vanilla", drop_path_rate=0.1, skip_unread_rows=True
        ),
        data=DataConfig(batch_size=128),
        optim=OptimConfig(lr=1.5e-3, warmup_epochs=10, clip_grad=3.0),
        run=RunConfig(output="runs/beit_base_in1k", epochs=800),
        statistics="imagenet",
        tokenizer=DALLE,
        tokenizer_precision="fp16",
    )


def beit_plus_base_in1k() -> PretrainConfig:
    """BEiT+ B on ImageNet-1K, 800 epochs: relative-position bias and LayerScale.

    torchrun --nproc_per_node=16 --no-python \\
        beit-fast pretrain beit_plus_base_in1k --data.path TRAIN

    16 ranks x 128 images. After 300 epochs the authors' log reads loss 6.30, accuracy 0.050, and
    their fine-tuning 83.2 % top-1.
    """
    return PretrainConfig(
        model=beit_config(
            "beit_base_patch16_224_8k_vocab", drop_path_rate=0.1, skip_unread_rows=True
        ),
        data=DataConfig(batch_size=128),
        optim=OptimConfig(lr=1.5e-3, warmup_epochs=10, clip_grad=3.0),
        run=RunConfig(output="runs/beit_plus_base_in1k", epochs=800),
        statistics="imagenet",
        tokenizer=DALLE,
        tokenizer_precision="fp16",
    )


def beit_plus_base_in22k() -> PretrainConfig:
    """BEiT+ B on ImageNet-22K, 150 epochs: the recipe of the published base weights.

    torchrun --nproc_per_node=16 --no-python \\
        beit-fast pretrain beit_plus_base_in22k --data.path TRAIN

    16 ranks x 128 images. Fine-tuned on 22K and then 1K it reaches 85.2 % top-1 at 224.
    """
    return PretrainConfig(
        model=beit_config(
            "beit_base_patch16_224_8k_vocab", drop_path_rate=0.1, skip_unread_rows=True
        ),
        data=DataConfig(batch_size=128),
        optim=OptimConfig(lr=1.5e-3, warmup_steps=10_000, clip_grad=3.0),
        run=RunConfig(output="runs/beit_plus_base_in22k", epochs=150),
        tokenizer=DALLE,
        tokenizer_precision="fp16",
    )


def beit_large_in1k() -> PretrainConfig:
    """BEiT-L on ImageNet-1K, 800 epochs: the vanilla ViT of the paper's tables.

    torchrun --nproc_per_node=16 --no-python \\
        beit-fast pretrain beit_large_in1k --data.path TRAIN

    16 ranks x 64 images x 2 micro-batches. Paper: 85.2 % top-1 after fine-tuning.
    """
    return PretrainConfig(
        model=beit_config(
            "beit_large_patch16_224_vanilla", drop_path_rate=0.1, skip_unread_rows=True
        ),
        data=DataConfig(batch_size=64),
        optim=OptimConfig(lr=1.5e-3, warmup_epochs=10, clip_grad=1.0),
        run=RunConfig(output="runs/beit_large_in1k", epochs=800, accumulate=2),
        statistics="imagenet",
        tokenizer=DALLE,
        tokenizer_precision="fp16",
    )


def beit_plus_large_in22k() -> PretrainConfig:
    """BEiT+ L on ImageNet-22K, 150 epochs: the published large weights.

    torchrun --nproc_per_node=16 --no-python \\
        beit-fast pretrain beit_plus_large_in22k --data.path TRAIN

    16 ranks x 64 images x 2 micro-batches. No command was published for Large: LayerScale 1e-5 and
    clipping at 1.0 are, the rest is Base's. Fine-tuned on 22K and then 1K: 87.4 % top-1 at 224.
    """
    return PretrainConfig(
        model=beit_config(
            "beit_large_patch16_224_8k_vocab", drop_path_rate=0.1, skip_unread_rows=True
        ),
        data=DataConfig(batch_size=64),
        optim=OptimConfig(lr=1.5e-3, warmup_steps=10_000, clip_grad=1.0),
        run=RunConfig(output="runs/beit_plus_large_in22k", epochs=150, accumulate=2),
        tokenizer=DALLE,
        tokenizer_precision="fp16",
    )


def small() -> PretrainConfig:
    """BEiT+ S (22 M parameters) on your own images with one GPU; trains its own tokenizer first.

    beit-fast pretrain small --data.path IMAGES

    256 images x 4 micro-batches = 1024 a step, and a dVAE of 2048 codes, a quarter as wide as
    DALL-E's, so that nothing has to be downloaded. With DALL-E's: `--tokenizer dalle.safetensors
    --tokenizer_training null --model.vocab_size 8192`. Not trained to the end by us yet.
    """
    return PretrainConfig(
        model=beit_config(
            "beit_small_patch16_224_8k_vocab",
            drop_path_rate=0.1,
            skip_unread_rows=True,
            vocab_size=2048,
        ),
        data=DataConfig(batch_size=256),
        optim=OptimConfig(lr=1.5e-3, warmup_epochs=10, clip_grad=3.0),
        run=RunConfig(output="runs/small", epochs=300, accumulate=4),
        tokenizer_training=small_tokenizer(),
    )


def demo() -> PretrainConfig:
    """The whole method in about three minutes on two CPU cores, on photographs that ship with us.

    beit-fast pretrain demo

    A dVAE of 512 codes on crops of 19 photographs, then a BEiT of 64 patches on its tokens.
    """
    side = 64
    return PretrainConfig(
        model=BeitConfig(
            img_size=side, patch_size=8, embed_dim=128, depth=4, num_heads=4, vocab_size=512
        ),
        data=DataConfig(path=PHOTOGRAPHS, batch_size=32, num_threads=2),
        masking=MaskingConfig(num_masked=25, min_block=4),
        views=ViewConfig(size=side, token_size=side, scale=(0.05, 0.5)),
        optim=OptimConfig(lr=2e-3, min_lr=1e-5, warmup_steps=20, clip_grad=3.0),
        run=RunConfig(output="runs/demo", steps=300, precision="fp32", cpu_threads=1, log_every=30),
        tokenizer_training=demo_tokenizer(),
    )


def dalle_tokenizer() -> DvaeTrainingConfig:
    """DALL-E's dVAE of 8192 codes as its authors trained it, 3 M steps of 512 images.

    torchrun --nproc_per_node=64 --no-python beit-fast tokenizer dalle --data.path IMAGES

    64 ranks x 8 images; ImageNet is far smaller than their data. Not trained by us.
    """
    return DvaeTrainingConfig(
        data=DataConfig(batch_size=8),
        optim=OptimConfig(
            lr=1e-4,
            min_lr=1.25e-6,
            warmup_steps=0,
            decay_steps=1_200_000,
            weight_decay=1e-4,
            clip_grad=None,
        ),
        run=RunConfig(output="runs/dalle_tokenizer", steps=3_000_000, ema_decay=0.999),
    )


def small_tokenizer() -> DvaeTrainingConfig:
    """A dVAE of 2048 codes, a quarter of DALL-E's width, for one GPU.

    beit-fast tokenizer small --data.path IMAGES

    DALL-E's schedules in a fiftieth of the steps, and the demo's start, which keeps codes in use.
    Not trained to the end by us yet.
    """
    return DvaeTrainingConfig(
        dvae=DvaeConfig(
            vocab_size=2048, encoder_width=64, decoder_width=64, decoder_input_width=128
        ),
        data=DataConfig(batch_size=64),
        view=SingleViewConfig(size=128, scale=(0.25, 1.0)),
        optim=OptimConfig(
            lr=3e-4, min_lr=3e-6, warmup_steps=1000, weight_decay=1e-4, clip_grad=1.0
        ),
        run=RunConfig(output="runs/small_tokenizer", steps=60_000, ema_decay=0.999),
        beta=CosineSchedule(start=0.0, end=6.6, num_steps=5_000),
        temperature=CosineSchedule(start=1.0, end=1 / 16, num_steps=40_000),
        codebook_init="kmeans",
        encoder_lr_scale=0.3,
    )


def demo_tokenizer() -> DvaeTrainingConfig:
    """The demo's dVAE: 512 codes on crops of 19 photographs, about a minute on two CPU cores.

    In so few steps DALL-E's random start leaves a dozen codes in use. Codes that start as clusters
    of the encoder's features, and an encoder that moves slowly, keep nearly all of them.
    """
    return DvaeTrainingConfig(
        dvae=DvaeConfig(
            vocab_size=512,
            encoder_width=24,
            decoder_width=24,
            decoder_input_width=64,
            blocks_per_group=1,
        ),
        data=DataConfig(path=PHOTOGRAPHS, batch_size=8, num_threads=2),
        view=SingleViewConfig(size=64, scale=(0.1, 1.0)),
        optim=OptimConfig(lr=6e-3, min_lr=6e-5, warmup_steps=20, weight_decay=1e-4, clip_grad=1.0),
        run=RunConfig(
            output="runs/demo_tokenizer", steps=400, precision="fp32", cpu_threads=1, log_every=50
        ),
        beta=CosineSchedule(start=0.0, end=6.6, num_steps=100),
        temperature=CosineSchedule(start=1.0, end=1 / 16, num_steps=280),
        codebook_init="kmeans",
        encoder_lr_scale=0.02,
    )


def probe_imagenet() -> ProbeConfig:
    """Linear probes of every block at the batch and epochs of unilm's, and kNN, on ImageNet-1K.

    beit-fast probe imagenet --checkpoint RUN --train TRAIN --test VAL

    One GPU; the features of BEiT-B take 98 GB of disk, those of BEiT-L 262. Paper, with fresh crops
    every epoch: BEiT-B 56.7 %, best at block 9, BEiT-L 73.5 %, at block 14. Not run by us yet.
    """
    return ProbeConfig(output="runs/probe_imagenet")


def probe_small() -> ProbeConfig:
    """Linear probes of every block, and kNN, on your own class folders of some thousand images.

    beit-fast probe small --checkpoint RUN --train TRAIN --test TEST

    The best block is usually in the middle and the best feature the mean of its patches: the last
    block's [CLS], where a supervised ViT is best, is the usual mistake.
    """
    return ProbeConfig(
        output="runs/probe_small",
        rates=(4e-3, 1.6e-2, 6.4e-2, 0.256),  # few steps: larger ones than ImageNet's
        batch_size=128,
        held_out=0.2,
    )


def _tokens_of(recipe: Callable[[], PretrainConfig]) -> Callable[[], PretokenizeConfig]:
    """The recipe that writes the token cache of another."""

    @functools.wraps(recipe)
    def pretokenize() -> PretokenizeConfig:
        config = recipe()
        return PretokenizeConfig(**vars(config), output=f"{config.run.output}_tokens")

    return pretokenize


PRETRAIN: dict[str, Callable[[], PretrainConfig]] = {
    "demo": demo,
    "digits": digits,
    "small": small,
    "beit_base_in1k": beit_base_in1k,
    "beit_plus_base_in1k": beit_plus_base_in1k,
    "beit_plus_base_in22k": beit_plus_base_in22k,
    "beit_large_in1k": beit_large_in1k,
    "beit_plus_large_in22k": beit_plus_large_in22k,
}
PRETOKENIZE = {name: _tokens_of(recipe) for name, recipe in PRETRAIN.items()}
PROBE: dict[str, Callable[[], ProbeConfig]] = {
    "digits": probe_digits,
    "small": probe_small,
    "imagenet": probe_imagenet,
}
TOKENIZER: dict[str, Callable[[], DvaeTrainingConfig]] = {
    "demo": demo_tokenizer,
    "digits": tokenizer_digits,
    "small": small_tokenizer,
    "dalle": dalle_tokenizer,
}
