"""A fine-tuning small enough to test: crops of photographs, an untrained encoder, two blocks."""

import functools

import pytest
import torch

from beit_fast import BeitForMaskedImageModeling
from beit_fast.model.config import BeitConfig
from beit_fast.tasks.finetune.config import FinetuneConfig, LabelledDataConfig
from beit_fast.train.config import OptimConfig, RunConfig
from labelled_images import write_photographs
from task_runs import with_fields


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Crops of three photographs: six of each to train on, two to test on."""
    return write_photographs(tmp_path_factory.mktemp("classes"))


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
def finetune_config(photographs, pretrained, tmp_path):
    """`finetune_config(section={field: value}, field=value)` changes the tiny configuration."""
    base = FinetuneConfig(
        model=BeitConfig(
            img_size=(32, 40),
            patch_size=8,
            use_rel_pos_bias=True,
            use_shared_rel_pos_bias=False,
            num_classes=0,
            drop_path_rate=0.3,
        ),
        data=LabelledDataConfig(
            path=str(photographs / "train"),
            test=str(photographs / "test"),
            batch_size=5,  # of 18 images: odd, and passes end within batches
            num_threads=2,
        ),
        optim=OptimConfig(lr=5e-3, warmup_steps=2, clip_grad=None),
        run=RunConfig(
            output=str(tmp_path / "run"),
            epochs=2,
            precision="fp32",
            device="cpu",
            log_every=2,
            evaluate_every=1,
            ema_decay=0.8,
        ),
        init=pretrained,
    )

    return functools.partial(with_fields, base)
