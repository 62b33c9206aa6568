"""Small labelled images, a sub-folder for each class, as classifiers train on."""

from pathlib import Path

import numpy as np
from PIL import Image

import beit_fast.data

# Of a classifier: in another order than the folders, one of which is missing.
FOUR_COLOURS = ["red", "blue", "pink", "green"]
PHOTOGRAPHED = ["bee", "galaxies", "lemurs"]  # classes of `write_photographs`
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}


def write_class_folders(folder, num_images, seed):
    """Noisy images of three colours at several sizes."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(num_images):
            noise = rng.integers(-30, 31, (40 + 3 * number, 60, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def write_photographs(folder):
    """Crops of three photographs: six of each below `train`, two below `test`."""
    photographs = Path(beit_fast.data.__file__).parent / "photographs"
    for name in PHOTOGRAPHED:
        image = Image.open(photographs / f"{name}.jpg")
        for number in range(8):
            path = folder / ("test" if number < 2 else "train") / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            left, top = 20 * number, 10 * number
            image.crop((left, top, left + 90, top + 80)).resize((45, 40)).save(path)
    return folder
