"""What a model sees and what it predicts: one row an image, one column a stage, with titles."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from beit_fast.files import replace_file


def hide_patches(images: Tensor, mask: Tensor, grid: tuple[int, int], fill: float = 0.5) -> Tensor:
    """Fill the patches of `images` (B, 3, h, w) where `mask` (B, L) is True, with grey."""
    height, width = images.shape[-2:]
    hidden = mask.view(-1, 1, *grid).float()
    hidden = torch.nn.functional.interpolate(hidden, size=(height, width), mode="nearest")
    return torch.where(hidden > 0, torch.full_like(images, fill), images)


def draw_columns(columns: Mapping[str, Tensor], path: Path) -> Path:
    """Draw columns of images as a PNG: title -> (B, 3, h, w), float in [0, 1], any h and w."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    num_rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.9 * len(columns), 1.9 * num_rows + 0.4), layout="constrained")
    grid = figure.subplots(num_rows, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        grid[0][column].set_title(title, fontsize=9)
        pixels = images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        for row in range(num_rows):
            grid[row][column].imshow(pixels[row], interpolation="nearest")
            grid[row][column].axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return path
