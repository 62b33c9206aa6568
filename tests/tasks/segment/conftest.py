"""Training a segmenter small enough to test: coloured boxes, an untrained encoder, two blocks."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast import BeitForMaskedImageModeling
from beit_fast.data.views.config import SegmentationViewConfig
from beit_fast.model.config import BeitConfig, SegmenterConfig
from beit_fast.tasks.segment.config import SegmentationDataConfig, SegmentConfig
from beit_fast.train.config import OptimConfig, RunConfig
from task_runs import with_fields

COLOURS = np.array([(60, 60, 60), (220, 60, 40), (40, 80, 220)], np.uint8)
IGNORED = 9


def _write_boxes(images, masks, count, seed):
    """Noise on a grey ground with a red and a blue box; the masks' ids are 0, 1, 2, and IGNORED
    on the border."""
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        ids = np.zeros((44 + 2 * number, 52), np.uint8)
        for label in (1, 2):
            top, left = rng.integers(2, 24), rng.integers(2, 30)
            ids[top : top + 16, left : left + 18] = label
        noise = rng.integers(-30, 31, (*ids.shape, 3))
        pixels = np.clip(COLOURS[ids].astype(int) + noise, 0, 255).astype(np.uint8)
        ids[:2] = IGNORED
        Image.fromarray(pixels).save(images / f"{number}.png")
        Image.fromarray(ids).save(masks / f"{number}.png")


@pytest.fixture
def write_boxes():
    return _write_boxes


@pytest.fixture(scope="session")
def boxes(tmp_path_factory):
    """Seven images to train on, three to test on."""
    folder = tmp_path_factory.mktemp("boxes")
    _write_boxes(folder / "train", folder / "train_masks", 7, seed=0)
    _write_boxes(folder / "test", folder / "test_masks", 3, seed=1)
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """An untrained BEiT as pre-training leaves it."""
    torch.manual_seed(0)
    config = BeitConfig(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, vocab_size=16
    )
    path = tmp_path_factory.mktemp("pretrained") / "beit.pth"
    torch.save({"model": BeitForMaskedImageModeling(config).state_dict()}, path)
    return str(path)


@pytest.fixture
def segment_config(boxes, pretrained, tmp_path):
    """`segment_config(section={field: value}, field=value)` changes the tiny configuration."""
    base = SegmentConfig(
        model=SegmenterConfig(
            img_size=(32, 40),
            patch_size=8,
            num_classes=0,
            head_channels=16,
            auxiliary_channels=8,
            drop_path_rate=0.3,
        ),
        data=SegmentationDataConfig(
            path=str(boxes / "train"),
            masks=str(boxes / "train_masks"),
            test=str(boxes / "test"),
            test_masks=str(boxes / "test_masks"),
            ignore=IGNORED,
            batch_size=2,  # of 7 images: passes end within batches
            num_threads=2,
        ),
        optim=OptimConfig(lr=5e-3, min_lr=0.0, schedule="poly", warmup_steps=2, clip_grad=None),
        run=RunConfig(
            output=str(tmp_path / "run"),
            steps=6,
            precision="fp32",
            device="cpu",
            log_every=2,
            evaluate_every=1,
            ema_decay=0.8,
        ),
        augment=SegmentationViewConfig(scale=(128, 32)),
        init=pretrained,
    )

    return functools.partial(with_fields, base)
