"""Named fine-tuning runs for classification. Each returns its whole configuration.

Numbers are those of unilm's README and scripts and of the paper's tables 9 and 10 (spec 7.1);
top-1 is theirs. `data.batch_size` is per rank and micro-batch: ranks x run.accumulate x
data.batch_size is the global batch, and rates are absolute, so keep that product.

Every recipe starts from the published weights that it was published with; `--init` takes your own.
"""

from collections.abc import Callable

from beit_fast.data.augment import AugmentConfig
from beit_fast.model.config import beit_config
from beit_fast.tasks.finetune import FinetuneConfig, LabelledDataConfig
from beit_fast.train.config import OptimConfig, RunConfig


def small_data() -> FinetuneConfig:
    """BEiT+ B on your own folder of a few thousand images in class folders, on one GPU.

    beit-fast finetune small_data --data.path TRAIN --data.test TEST
    """
    return FinetuneConfig(
        model=beit_config("beit_base_patch16_224", drop_path_rate=0.1, num_classes=0),
        data=LabelledDataConfig(batch_size=64),
        optim=OptimConfig(lr=5e-4, min_lr=1e-6, warmup_epochs=10, clip_grad=None),
        run=RunConfig(output="runs/small_data", epochs=100, ema_decay=0.999),
        init="beit_base_patch16_224_pt22k",
        augment=AugmentConfig(),
    )


FINETUNE: dict[str, Callable[[], FinetuneConfig]] = {"small_data": small_data}
