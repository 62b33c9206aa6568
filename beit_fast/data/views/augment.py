"""What a classifier learns from: a random crop, flipped, augmented, and how to erase and mix it.

    crop, resize bicubic, flip -> RandAugment        here, uint8, in the loader's threads
    normalise -> erase -> mixup or CutMix            on the device, as drawn here (mixing.py)

Source: timm's `transforms_imagenet_train` as unilm beit `run_class_finetuning.py` calls it. Its
colour jitter is ignored there beside RandAugment, so there is none.
"""

import numpy as np

from beit_fast.data.seeds import SampleSeed
from beit_fast.data.views.config import AugmentConfig, ViewConfig
from beit_fast.data.views.mixing import draw_erase, draw_mix
from beit_fast.data.views.rand_augment import rand_augment
from beit_fast.data.views.two_views import make_views


class AugmentedSample:
    """One augmented view, for training a classifier. A batch holds

        images       uint8 (B, height, width, 3)
        erase        int32 (B, 4): top, left, height, width; unless nothing is ever erased
        mix_weights  float32 (2,), mix_box int32 (4,) as `mixing.mix` takes them; unless images are
                     not mixed. Its first sample draws for the batch

    size: (height, width) in pixels; mean: of the model's pixels, what RandAugment fills with.
    """

    def __init__(self, size: tuple[int, int], augment: AugmentConfig, mean: tuple[float, ...]):
        self.augment = augment
        self.fill = tuple(min(255, round(255 * value)) for value in mean)
        self.view = ViewConfig(
            size=size,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=0.0,
        )

    def __call__(self, data: bytes, seed: SampleSeed) -> dict[str, np.ndarray]:
        augment, size = self.augment, self.view.size
        views, _ = make_views(data, self.view, seed.rng("view"), ("images",))
        image = views["images"]
        if augment.rand_augment is not None:
            image = rand_augment(image, augment.rand_augment, self.fill, seed.rng("augment"))
        sample = {"images": image}
        if augment.erase > 0:
            box = draw_erase(*size, augment.erase, seed.rng("erase"))
            sample["erase"] = np.array(box, np.int32)
        if augment.mixes:
            drawn = draw_mix(*size, augment.mixup, augment.cutmix, seed.rng("mix"))
            sample["mix_weights"], sample["mix_box"] = drawn
        return sample

    def collate(self, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        for name in ("mix_weights", "mix_box"):
            if name in batch:
                batch[name] = batch[name][0]
        return batch
