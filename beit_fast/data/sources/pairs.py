"""Which mask belongs to which image: the one of the same name in the other folder."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from beit_fast.data.sources.folder import ImageFolder
from beit_fast.data.sources.scan import scan

_NAMED = 3  # images in an error


def pair_masks(images: ImageFolder, masks: Path, follow_links: bool) -> tuple[list[str], list[str]]:
    """The masks of all images in their order, and the masks of no image: paths below `masks`.

    Names match without their endings, and with the sub-folders they lie in.

    Raises ValueError for a folder that is missing, has no PNG file, or lies in the other one, for
    images without a mask, and for two files that have one name.
    """
    if not masks.is_dir():
        lies = "is no folder" if masks.exists() else "does not exist"
        raise ValueError(f"the mask folder {masks} {lies}: check the path")
    _refuse_nested(images.root, masks)
    paths, found = scan(masks, follow_links)
    others = [path for path in paths if not path.lower().endswith(".png")]
    masks_of = _by_stem(masks, [path for path in paths if path.lower().endswith(".png")])
    if not masks_of:
        left = [f"{len(others)} image{'s' * (len(others) != 1)} of other formats"] if others else []
        left += filter(None, [found.left_out()])
        said = f" ({', '.join(left)})" if left else ""
        raise ValueError(
            f"no masks under {masks}{said}: put PNG files of class ids there, each with its "
            "image's name"
        )
    stems = list(_by_stem(images.root, images.paths))
    if missing := [stem for stem in stems if stem not in masks_of]:
        raise ValueError(_missing(images, masks, missing, masks_of.keys()))
    of_images = set(stems)
    without_image = [path for stem, path in masks_of.items() if stem not in of_images]
    return [masks_of[stem] for stem in stems], without_image


def _by_stem(root: Path, paths: Sequence[str]) -> dict[str, str]:
    """In the order of `paths`."""
    found: dict[str, str] = {}
    for path in paths:
        stem = os.path.splitext(path)[0]
        if stem in found:
            raise ValueError(
                f"{found[stem]} and {path} in {root} have one name, so that their masks would be "
                "one: rename or remove one"
            )
        found[stem] = path
    return found


def _refuse_nested(images: Path, masks: Path) -> None:
    """Raise ValueError where masks would be read as images."""
    inside, outside = masks.resolve(), images.resolve()
    if inside == outside or outside in inside.parents:
        where = "is the image folder" if inside == outside else f"lies in the image folder {images}"
        raise ValueError(
            f"the mask folder {masks} {where}, so that masks would be taken for images: keep the "
            "two in folders of their own"
        )


def _missing(
    images: ImageFolder, masks: Path, missing: list[str], stems_of_masks: Collection[str]
) -> str:
    """What to say of images without a mask, and of what one of them may be called."""
    names = [f"{path}" for path in images.paths if os.path.splitext(path)[0] in missing[:_NAMED]]
    more = f" and {len(missing) - len(names)} more" if len(missing) > len(names) else ""
    first = missing[0]
    close = (
        stem
        for stem in sorted(stems_of_masks)
        if os.path.basename(stem) == os.path.basename(first) or stem.startswith(first)
    )
    found = next(close, "")
    hint = f" and not {found}.png, which is there" if found else ""
    return (
        f"{len(missing)} of {len(images)} images have no mask in {masks}: {', '.join(names)}"
        f"{more}; the mask of {names[0]} must be {first}.png{hint}: add or rename it, or remove "
        "the image"
    )
