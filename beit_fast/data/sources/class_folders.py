"""Labelled images: a folder with a sub-folder for each class."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from beit_fast.data.sources.folder import ImageFolder, ImageSource

# Names of the parts of a data set, which are not taken for classes where folders lie in them.
_PARTS = frozenset(
    (
        *("train", "training", "trainval", "val", "valid", "validation", "dev", "eval"),
        *("test", "testing", "unlabeled", "unlabelled", "extra"),
    )
)


def class_folders(
    path: str | Path, *, follow_links: bool = True, fewest: int = 2
) -> tuple[ImageSource, Tensor, list[str]]:
    """Images below `path`, their labels int64 (n,), and the classes: its sub-folders by name.

    Links are followed as `ImageFolder` does it: a linked folder is a class, and an image that two
    classes link to counts in both.

    Raises ValueError for an image outside the sub-folders, a class without images, fewer classes
    than `fewest`, and for the parts of a data set (train, val) in place of classes; in the last two
    cases it names the folder to pass, where there is one.
    """
    source = ImageFolder(path, follow_links=follow_links)
    if stray := next((name for name in source.paths if os.sep not in name), None):
        raise ValueError(
            f"{stray} lies in {path} and in no class folder: put images in one sub-folder a class"
        )
    names, found = source.found.folders, source.found
    number = {name: label for label, name in enumerate(names)}
    labels = torch.tensor([number[name.split(os.sep, 1)[0]] for name in source.paths])
    if empty := sorted(set(range(len(names))) - set(labels.tolist())):
        name = names[empty[0]]
        if why := found.unreadable.get(name):
            raise ValueError(
                f"the class {name!r} of {path} cannot be read ({why}): check its permissions"
            )
        left_out = f" (in all classes: {said})" if (said := found.left_out()) else ""
        raise ValueError(
            f"no images in the class {name!r} of {path}{left_out}: add some or remove the folder"
        )
    check_classes(path, names, source.paths, fewest)
    return source, labels, names


def check_classes(
    path: str | Path, names: Sequence[str], images: Sequence[str], fewest: int
) -> None:
    """Raise ValueError where the sub-folders `names` of `path` are no `fewest` classes.

    images: their paths relative to `path`.
    """
    if parts := parts_of_a_data_set(names, images):
        raise ValueError(
            f"{path} has the folders {', '.join(names)}, which look like the parts of a data set "
            f"and not like classes: pass {_either(path, parts)}"
        )
    if len(names) >= fewest:
        return
    message = f"{path} has one class, {names[0]}, and one class teaches nothing: pass "
    where, folders, images = str(path), names, list(images)  # a URL is no Path
    while len(folders) == 1 and all(os.sep in name for name in images):  # to where they divide
        where = os.path.join(where, folders[0])
        images = [name.split(os.sep, 1)[1] for name in images]
        folders = sorted({name.split(os.sep, 1)[0] for name in images if os.sep in name})
    if len(folders) < 2 or not all(os.sep in name for name in images):
        raise ValueError(f"{message}a folder with a sub-folder for each of two classes or more")
    if parts := parts_of_a_data_set(folders, images):
        raise ValueError(message + _either(where, parts))
    raise ValueError(f"{message}{where} if its {len(folders)} folders are the classes")


def parts_of_a_data_set(names: Sequence[str], images: Sequence[str]) -> list[str]:
    """Of folders that are all called as parts are, those with classes in them; else none."""
    if not called_as_parts(names):
        return []
    return sorted({name.split(os.sep, 1)[0] for name in images if name.count(os.sep) > 1})


def called_as_parts(names: Sequence[str]) -> bool:
    """Whether folders are called train, val, test or the like."""
    return all(name.lower() in _PARTS for name in names)


def _either(path: str | Path, names: Sequence[str]) -> str:
    return " or ".join(os.path.join(path, name) for name in names)
