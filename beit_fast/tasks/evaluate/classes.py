"""Names of classes: of a checkpoint's outputs, of folders, and which of them are the same."""

import functools
import re
from collections.abc import Sequence

from timm.data import ImageNetInfo

_WORDNET_ID = re.compile(r"n\d{8}")
_IMAGENET = {1000: "imagenet-1k", 21841: "imagenet-22k"}  # classes -> timm's name
_EXAMPLES = 5  # names in a message


def match_classes(
    folders: Sequence[str],
    classes: Sequence[str] | None,
    num_classes: int,
    *,
    by_order: bool = False,
) -> tuple[list[int], list[str], str]:
    """(class of each folder, names of all classes, how they were matched).

    By name where the checkpoint has names, or where folders are called by ImageNet's WordNet ids
    and the head has as many classes as ImageNet; else, and with `by_order`, the sorted folders are
    the classes. Raises ValueError where neither can be.
    """
    known = {} if classes is None else dict(zip(classes, range(num_classes), strict=True))
    if not by_order and not any(name in known for name in folders):
        wordnet = wordnet_ids(num_classes)
        if wordnet is not None and all(map(_WORDNET_ID.fullmatch, folders)):
            known, classes = dict(zip(wordnet, range(num_classes), strict=True)), wordnet
    if by_order or not known:
        if len(folders) != num_classes:
            names = "" if by_order else " and says no names of them"
            raise ValueError(
                f"there are {len(folders)} class folders and the checkpoint has {num_classes} "
                f"classes{names}: give a folder for each of its classes, in their sorted order, or "
                "fine-tune it on these (beit-fast finetune RECIPE --init)"
            )
        return list(range(num_classes)), list(folders), "the sorted folders are the classes"
    if unknown := [name for name in folders if name not in known]:
        raise ValueError(
            f"{len(unknown)} of {len(folders)} class folders are no class of the checkpoint: "
            f"{_some(unknown)}; its {num_classes} classes are {_some(list(classes))}: rename the "
            "folders, or pass --match order if their sorted order is that of its classes"
        )
    if twice := [name for name in folders if list(classes).count(name) > 1]:
        raise ValueError(
            f"{_some(twice)} is the name of several classes of the checkpoint: pass --match order "
            "with a folder for each of its classes"
        )
    how = "matched by name"
    if missing := [name for name in classes if name not in set(folders)]:
        how += f"; {len(missing)} of {num_classes} classes have no folder: {_some(missing)}"
    if sorted(classes) != list(classes):
        how += "; the checkpoint's order is not that of the folders"
    return [known[name] for name in folders], list(classes), how


def wordnet_ids(num_classes: int) -> tuple[str, ...] | None:
    """ImageNet's classes in order, n01440764 first of the 1,000; None for another number."""
    return tuple(_imagenet(num_classes).label_names()) if num_classes in _IMAGENET else None


def describe_class(name: str, num_classes: int) -> str:
    """The class's name, with ImageNet's words for a WordNet id of it."""
    if num_classes not in _IMAGENET or not _WORDNET_ID.fullmatch(name):
        return name
    return _imagenet(num_classes).label_name_to_description(name)


@functools.cache
def _imagenet(num_classes: int) -> ImageNetInfo:
    return ImageNetInfo(_IMAGENET[num_classes])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
    return ", ".join(names[:_EXAMPLES]) + more
