"""Images whose pixels have classes, and a model of them, both small enough for loops in Python."""

import io
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn

from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.segmentation import MaskedImage
from beit_fast.labels import IGNORE

IGNORED_VALUE = 255  # in the masks


class PatchModel(nn.Module):
    """Logits of patches of 4 pixels, in a window of one size; keeps the batches it was given."""

    def __init__(self, num_classes=5, window=(16, 24)):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, num_classes, 4, stride=4)
        self.config = SimpleNamespace(image_pixels=window, num_classes=num_classes)
        self.batches = []

    def forward(self, images):
        assert tuple(images.shape[1:]) == (3, *self.config.image_pixels)
        self.batches.append(len(images))
        return self.patches(images)


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Pairs:
    """A source of noise with masks, of sizes that differ; keeps who was read."""

    def __init__(self, count, num_classes=5, seed=0):
        self.palette = None
        self.classes = tuple(f"class {i}" for i in range(num_classes))
        rng = np.random.default_rng(seed)
        self.files, self.reads = [], []
        for number in range(count):
            size = (13 + 5 * number % 31, 17 + 7 * number % 29)
            mask = rng.integers(0, num_classes, size, dtype=np.uint8)
            mask[rng.random(size) < 0.1] = IGNORED_VALUE
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            self.files.append(MaskedImage(encoded(image), encoded(mask)))

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return f"images/{index}.png"

    def read(self, index):
        self.reads.append(index)
        return self.files[index]

    def spoil(self, index, **files):
        self.files[index] = self.files[index]._replace(**files)

    def labels(self, mask):
        try:
            ids = np.array(Image.open(io.BytesIO(mask))).astype(np.int16)
        except OSError as error:
            raise BadImageError(f"its mask: {error}") from error
        return np.where(ids == IGNORED_VALUE, np.int16(IGNORE), ids)
