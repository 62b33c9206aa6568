"""Until the kernel is there: its views by Pillow."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.two_views import ViewDraw, reference_views

STEPS = ("brightness", "contrast", "saturation")


def ragged_views(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    steps: Tensor,
    factors: Tensor,
    size: tuple[int, int],
    token_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    made = []
    for i, (height, width) in enumerate(sizes.tolist()):
        first = int(offsets[i])
        image = pixels[first : first + 3 * height * width].view(height, width, 3).numpy()
        jitter = tuple(
            (STEPS[n], f) for n, f in zip(steps[i].tolist(), factors[i].tolist(), strict=True)
        )
        draw = ViewDraw(jitter, bool(flips[i]), tuple(boxes[i].tolist()))
        config = ViewConfig(size=size, token_size=token_size)
        made.append(reference_views(Image.fromarray(image), draw, config))
    return tuple(
        torch.from_numpy(np.stack([m[name] for m in made])) for name in ("images", "token_images")
    )
