"""Named runs of a tokenizer.

Each is a function that returns the whole configuration; change it with `dataclasses.replace`, or on
the command line.
"""

from beit_fast.data.config import PHOTOGRAPHS, DataConfig
from beit_fast.data.views.config import SingleViewConfig
from beit_fast.tasks.pretrain.config import DvaeTrainingConfig
from beit_fast.tokenizer.config import CosineSchedule, DvaeConfig
from beit_fast.train.config import OptimConfig, RunConfig


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
