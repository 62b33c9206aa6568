"""The method from start to end on scikit-learn's digits, on a CPU in minutes, without a network.

    beit-fast pretrain digits                                       # 997 images, no labels
    beit-fast probe digits --checkpoint runs/digits                 # 997 labels
    beit-fast finetune digits                                       # 100 labels

bench/science.py repeats it with several seeds, against the same net without pre-training, and with
the variants of the paper's Table 4. What is fixed here was chosen on digits:valid; digits:test is
for counting. The net is the paper's vanilla one, 4 x 4 patches of 8 x 8 pixels, each 2 x 2 pixels
as they were written. Digits are not mirrored, and hardly cropped: they fill their images.
"""

from beit_fast.data.config import DataConfig, MaskingConfig
from beit_fast.data.views.config import AugmentConfig, SingleViewConfig, ViewConfig
from beit_fast.model.config import BeitConfig
from beit_fast.tasks.finetune.config import FinetuneConfig, LabelledDataConfig
from beit_fast.tasks.pretrain.config import DvaeTrainingConfig, PretrainConfig
from beit_fast.tasks.probe.config import ProbeConfig
from beit_fast.tokenizer.config import CosineSchedule, DvaeConfig
from beit_fast.train.config import OptimConfig, RunConfig

SIDE = 32
NET = BeitConfig(
    img_size=SIDE,
    patch_size=8,
    embed_dim=64,
    depth=4,
    num_heads=4,
    vocab_size=64,
    init_values=None,
    use_abs_pos_emb=True,
    use_shared_rel_pos_bias=False,
    num_classes=0,
)


def digits() -> PretrainConfig:
    """A small BEiT on scikit-learn's digits, in about a minute and a half on one CPU core.

    beit-fast pretrain digits

    A dVAE of 64 codes, then a vanilla BEiT of 4 blocks of 64. Nothing is downloaded, but
    scikit-learn has to be installed.
    """
    return PretrainConfig(
        model=NET,
        data=DataConfig(path="digits:train", batch_size=32, num_threads=1),
        masking=MaskingConfig(num_masked=6, min_block=2),
        views=ViewConfig(size=SIDE, token_size=SIDE, scale=(0.85, 1.0), color_jitter=0, hflip=0),
        optim=OptimConfig(lr=4e-3, min_lr=1e-5, warmup_steps=20, clip_grad=3.0),
        run=RunConfig(
            output="runs/digits", steps=1200, precision="fp32", cpu_threads=1, log_every=100
        ),
        tokenizer_training=tokenizer_digits(),
    )


def tokenizer_digits() -> DvaeTrainingConfig:
    """The dVAE of the digits: 64 codes for 8 x 8 pixels, in about 15 seconds on one CPU core.

    beit-fast tokenizer digits
    """
    return DvaeTrainingConfig(
        dvae=DvaeConfig(
            vocab_size=64,
            encoder_width=16,
            decoder_width=16,
            decoder_input_width=32,
            blocks_per_group=1,
        ),
        data=DataConfig(path="digits:train", batch_size=16, num_threads=1),
        view=SingleViewConfig(size=SIDE, scale=(0.6, 1.0), hflip=0),
        optim=OptimConfig(lr=6e-3, min_lr=6e-5, warmup_steps=20, weight_decay=1e-4, clip_grad=1.0),
        run=RunConfig(
            output="runs/digits_tokenizer",
            steps=300,
            precision="fp32",
            cpu_threads=1,
            log_every=100,
        ),
        beta=CosineSchedule(start=0.0, end=6.6, num_steps=75),
        temperature=CosineSchedule(start=1.0, end=1 / 16, num_steps=210),
        codebook_init="kmeans",
        encoder_lr_scale=0.02,
    )


def finetune_digits() -> FinetuneConfig:
    """Ten labelled digits of each class, from `beit-fast pretrain digits`: seconds on a CPU core.

    beit-fast finetune digits

    `--init null` is the same net from scratch.
    """
    return FinetuneConfig(
        model=NET,
        data=LabelledDataConfig(
            path="digits:train:10", test="digits:test", batch_size=20, num_threads=1
        ),
        optim=OptimConfig(lr=3e-3, min_lr=1e-6, warmup_epochs=10, clip_grad=None),
        run=RunConfig(
            output="runs/digits_finetuned",
            epochs=100,
            precision="fp32",
            cpu_threads=1,
            log_every=100,
        ),
        augment=AugmentConfig(
            scale=(0.6, 1.0), hflip=0, rand_augment=None, erase=0, mixup=0, cutmix=0
        ),
        init="runs/digits",
        layer_decay=1.0,
        crop_pct=1.0,
    )


def probe_digits() -> ProbeConfig:
    """Linear probes of every block, and kNN, with the labels of all 997 training images.

    beit-fast probe digits --checkpoint runs/digits
    """
    return ProbeConfig(
        train="digits:train",
        test="digits:test",
        output="runs/digits_probe",
        precision="fp32",
        crop_pct=1.0,
        rates=(4e-3, 1.6e-2, 6.4e-2, 0.256),
        batch_size=128,
        held_out=0.2,
        num_threads=1,
    )
