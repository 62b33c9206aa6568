"""Named probes of a pre-trained encoder."""

from beit_fast.tasks.probe.config import ProbeConfig


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
