"""Named runs. Each returns its whole configuration; a variation is `dataclasses.replace`.

Numbers are those of the paper's Table 12 and of unilm's README (spec 6). `data.batch_size` is per
rank and micro-batch: ranks x run.accumulate x data.batch_size is the global batch, 2048 for the
published recipes whatever the split. Rates are absolute, so keep that product.
"""

import functools
from collections.abc import Callable

from beit_fast.data.config import PHOTOGRAPHS, DataConfig, MaskingConfig
from beit_fast.data.views.config import ViewConfig
from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.recipes.tokenizer import demo_tokenizer, small_tokenizer
from beit_fast.tasks.pretrain.config import PretokenizeConfig, PretrainConfig
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


def tokens_of(recipe: Callable[[], PretrainConfig]) -> Callable[[], PretokenizeConfig]:
    """The recipe that writes the token cache of another."""

    @functools.wraps(recipe)
    def pretokenize() -> PretokenizeConfig:
        config = recipe()
        return PretokenizeConfig(**vars(config), output=f"{config.run.output}_tokens")

    return pretokenize
