"""Labelled images: a folder with a sub-folder for each class."""

import os
from pathlib import Path

import torch
from torch import Tensor

from beit_fast.data.datasets import ImageFolder, ImageSource
from beit_fast.data.digits import is_digits, labelled_digits


def class_folders(path: str | Path) -> tuple[ImageSource, Tensor, list[str]]:
    """Images below `path`, their labels int64 (n,), and the classes: its sub-folders by name.

    `path` may also name scikit-learn's digits, see digits.py.

    Raises ValueError for a folder without classes, an image outside them, a class without images.
    """
    if is_digits(path):
        return labelled_digits(str(path))
    source = ImageFolder(path)
    below = [os.path.relpath(source.name(index), path) for index in range(len(source))]
    if stray := next((name for name in below if os.sep not in name), None):
        raise ValueError(
            f"{stray} lies in {path} and in no class folder: put images in one sub-folder a class"
        )
    names = sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))
    number = {name: label for label, name in enumerate(names)}
    labels = torch.tensor([number[name.split(os.sep, 1)[0]] for name in below])
    if empty := sorted(set(range(len(names))) - set(labels.tolist())):
        raise ValueError(
            f"no images in the class {names[empty[0]]!r} of {path}: add some or remove the folder"
        )
    return source, labels, names
