"""Views of ragged batches: ours, and what else makes them. Cases of `peers_input.py`.

"torch" is ours tap by tap, "interpolate" torch's antialiased resize, an image at a time, bicubic
for both views, to a level or two of the same and without jitter; on a CPU "pillow" makes the same
bits. Bytes: crops read and views written; with jitter images read once more, for their mean grey.
"""

import functools
import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.two_views import ViewDraw, draw_view, reference_views
from beit_fast.kernels.input.ragged_views import ragged_views
from beit_fast.kernels.input.ragged_views_reference import STEPS, ragged_views_reference
from kernels import Case, try_all

SIZES = ((375, 500), (500, 375), (333, 500), (500, 500))  # of photographs in ImageNet
CHECKED = 8  # images held against the reference


def views_cases(B: int, device: torch.device, only: str) -> Iterator[Case]:
    """Both views of B images, with the official jitter and without."""
    for jitter in (True, False):
        name = f"ragged_views-B{B}{'-jitter' * jitter}"
        if only in name:
            yield _case(name, B, jitter, device)


def _case(name: str, B: int, jitter: bool, device: torch.device) -> Case:
    config, rng = ViewConfig(kind="reference", color_jitter=0.4 * jitter), random.Random(0)
    sizes = [SIZES[b % len(SIZES)] for b in range(B)]
    draws = [draw_view(*size, config, rng) for size in sizes]
    areas = torch.tensor([3 * height * width for height, width in sizes], device="cpu")
    pixels = torch.randint(0, 256, (int(areas.sum()),), dtype=torch.uint8, device=device)
    arguments = _arguments(pixels, areas, sizes, draws)

    def run(arguments: dict, backend: str | None = None) -> list[Tensor]:
        return ragged_views(**arguments, backend=backend)

    ours = functools.partial(run, arguments)
    candidates = {"ours": ours, "torch": functools.partial(run, arguments, "torch")}
    if not jitter:
        candidates["interpolate"] = functools.partial(_interpolated, arguments, draws, config)
    if device.type == "cpu":
        candidates["pillow"] = functools.partial(_by_pillow, arguments, draws, config)
    made, failed = try_all({peer: (lambda run=run: run) for peer, run in candidates.items()})

    def check() -> None:
        few = {k: v if k == "pixels" else v[:CHECKED] for k, v in arguments.items()}
        wanted = ragged_views_reference(**few | {"pixels": pixels.cpu()})
        if not all(map(torch.equal, (view.cpu() for view in run(few)), wanted)):
            raise AssertionError("ours is not the reference, bit for bit: nothing is timed")

    crops = sum(3 * draw.box[2] * draw.box[3] for draw in draws)
    num_bytes = crops + sum(view.numel() for view in ours()) + jitter * int(areas.sum())
    return Case(name, made, num_bytes, 0.0, failed=failed, check=check)


def _arguments(
    pixels: Tensor, areas: Tensor, sizes: list[tuple[int, int]], draws: list[ViewDraw]
) -> dict:
    on_cpu = functools.partial(torch.tensor, device="cpu")
    steps = [[STEPS.index(name) for name, _ in draw.jitter] for draw in draws]
    return {
        "pixels": pixels,
        "offsets": areas.cumsum(0) - areas,
        "sizes": on_cpu(sizes),
        "boxes": on_cpu([draw.box for draw in draws]),
        "flips": on_cpu([draw.flip for draw in draws]),
        "planar": torch.zeros(len(draws), dtype=torch.bool, device="cpu"),
        "steps": on_cpu(steps, dtype=torch.int64),
        "factors": on_cpu([[factor for _, factor in draw.jitter] for draw in draws]),
    }


def _images(arguments: dict) -> Iterator[Tensor]:
    for offset, (height, width) in zip(
        arguments["offsets"].tolist(), arguments["sizes"].tolist(), strict=True
    ):
        yield arguments["pixels"][offset:][: 3 * height * width].view(height, width, 3)


def _interpolated(
    arguments: dict, draws: list[ViewDraw], config: ViewConfig
) -> list[tuple[Tensor, ...]]:
    views = []
    for image, draw in zip(_images(arguments), draws, strict=True):
        image = image.flip(1) if draw.flip else image
        top, left, height, width = draw.box
        crop = image[top : top + height, left : left + width].permute(2, 0, 1)[None].float()
        views.append(
            tuple(
                torch.nn.functional.interpolate(crop, size, mode="bicubic", antialias=True)
                .round_()
                .clamp_(0, 255)
                .to(torch.uint8)
                for size in (config.size, config.token_size)
            )
        )
    return views


def _by_pillow(
    arguments: dict, draws: list[ViewDraw], config: ViewConfig
) -> list[dict[str, np.ndarray]]:
    return [
        reference_views(Image.fromarray(image.numpy()), draw, config)
        for image, draw in zip(_images(arguments), draws, strict=True)
    ]
