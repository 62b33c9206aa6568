"""Small labelled images, a sub-folder for each class, as classifiers train on."""

import numpy as np
from PIL import Image

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
