"""The published BEiT checkpoints by name, and the pictures each of them wants.

    path, checkpoint = find_published("beit_base_patch16_224_pt22k")

A name is unilm's file without .pth, or the id on the Hugging Face hub. Files are taken from the
hub's cache or torch.hub's if they are there, and downloaded if not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from beit_fast.model.config import VARIANTS, BeitConfig, SegmenterConfig, beit_config

BASE_URL = "https://github.com/addf400/files/releases/download/v1.0"
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class Published:
    """One checkpoint. mean and std are of pixels in 0..1; crop_pct of the resized short side."""

    name: str
    task: Literal["mim", "classifier", "segmentation"]
    config: BeitConfig
    hf_id: str | None  # on the hub, in transformers' layout
    timm_id: str | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float | None  # None: not cropped (segmentation slides a window)
    interpolation: Literal["bicubic", "bilinear"]
    num_classes: int  # of the head; 0 for masked image modelling

    @property
    def url(self) -> str:
        """unilm's file."""
        return f"{BASE_URL}/{self.name}.pth"


def published(name: str) -> Published:
    """The entry called `name`. Raises ValueError that lists the names."""
    found = PUBLISHED.get(name) or next(
        (entry for entry in PUBLISHED.values() if entry.hf_id == name), None
    )
    if found is None:
        raise ValueError(f"no published checkpoint {name!r}: pass one of {', '.join(PUBLISHED)}")
    return found


def find_published(name: str) -> tuple[Path, Published]:
    """A folder of the hub's cache or unilm's .pth, downloaded where it is not there yet.

    Raises ValueError for another name, OSError where there is no file and none can be had.
    """
    entry = published(name)
    file = _torch_cache() / f"{entry.name}.pth"
    if file.is_file():
        return file, entry
    if entry.hf_id is not None:
        return _hub_folder(entry.hf_id), entry
    return _download(entry.url, file), entry


def _hub_folder(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = (
        ["config.json", "model*.safetensors", "*.safetensors.index.json"],
        ["config.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"],
    )
    try:
        for patterns in wanted:
            folder = Path(snapshot_download(repository, allow_patterns=patterns))
            if any(folder.glob(patterns[1])):
                return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise OSError(
            f"{repository}: the hub cannot be reached ({type(error).__name__}); download it where "
            f"there is a network, `hf download {repository}`, and pass the folder"
        ) from error
    raise OSError(f"{repository} in the cache has no weights: `hf download {repository}`")


def _download(url: str, file: Path) -> Path:
    import torch

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), progress=False)
    except OSError as error:  # URLError and HTTPError are such
        raise OSError(f"{url} cannot be had ({error}): download it elsewhere to {file}") from error
    return file


def _torch_cache() -> Path:
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def _entry(
    name: str,
    variant: str,
    *,
    task: Literal["mim", "classifier", "segmentation"] = "classifier",
    hf: str | None = None,
    timm: str | None = None,
    statistics: tuple = _HALF,
    classes: int = 1000,
    **overrides: object,
) -> Published:
    overrides = {"num_classes": 0 if task == "mim" else classes, **overrides}
    if task == "segmentation":
        config = SegmenterConfig(**{**VARIANTS[variant], **overrides})
    else:
        config = beit_config(variant, **overrides)
    mean, std = statistics
    return Published(
        name=name,
        task=task,
        config=config,
        hf_id=f"microsoft/{hf}" if hf else None,
        timm_id=timm,
        mean=mean,
        std=std,
        # timm's configurations; pre-training has none, its evaluation here resizes and crops as 224
        crop_pct=None if task == "segmentation" else 0.9 if config.img_size == 224 else 1.0,
        interpolation="bilinear" if task == "segmentation" else "bicubic",
        num_classes=config.num_classes,
    )


def _entries() -> list[Published]:
    entries = []
    for size in ("base", "large"):
        stem = f"beit_{size}_patch16"
        hub = f"beit-{size}-patch16"
        entries += [
            _entry(f"{stem}_224_pt22k", f"{stem}_224_8k_vocab", task="mim", hf=f"{hub}-224-pt22k"),
            _entry(
                f"{stem}_224_pt22k_ft22k",
                f"{stem}_224",
                hf=f"{hub}-224-pt22k-ft22k",
                timm=f"{stem}_224.in22k_ft_in22k",
                classes=21841,
            ),
            _entry(f"{stem}_224_pt22k_ft1k", f"{stem}_224"),
        ]
        for pixels in (224, 384) if size == "base" else (224, 384, 512):
            entries.append(
                _entry(
                    f"{stem}_{pixels}_pt22k_ft22kto1k",
                    f"{stem}_{pixels}",
                    hf=f"{hub}-{pixels}",
                    timm=f"{stem}_{pixels}.in22k_ft_in22k_in1k",
                )
            )
        entries.append(
            _entry(
                f"{stem}_640_pt22k_ft22ktoade20k",
                f"{stem}_224",
                task="segmentation",
                hf=f"beit-{size}-finetuned-ade-640-640",
                statistics=_IMAGENET,
                classes=150,
                img_size=640,
            )
        )
    entries.append(
        _entry(
            "beit_base_patch16_224_pt1k_800ep",
            "beit_base_patch16_224_vanilla",
            task="mim",
            statistics=_IMAGENET,
        )
    )
    return entries


PUBLISHED: dict[str, Published] = {entry.name: entry for entry in _entries()}
