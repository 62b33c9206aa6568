"""The views of kind gpu: from a batch of files and draws to pixels, on the device that trains.

    bytes --decoder--> images of many sizes --ragged_views--> images, token_images of one size

In a thread and on a stream of its own, beside the training step. What comes out is finished when it
is handed over: whoever takes it waits for nothing, and need only tell the allocator on which stream
it is read (`taken`).

Images are decoded some at a time, as many as have PIXELS_AT_ONCE: their memory does not grow with
the batch. Decoded pixels are three bytes each, there twice while they are packed.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from beit_fast.data.device_decode import DecodeCounts, DeviceDecoder, device_decoder
from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.sources.late import LateImage
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.stand_in import ragged_views
from beit_fast.data.views.two_views import VIEWS, ViewDraw

PIXELS_AT_ONCE = 2**27
STEPS = ("brightness", "contrast", "saturation")  # of jitter, by the kernel's numbers
Late = tuple[LateImage, ViewDraw]
Replace = Callable[[int, BadImageError], Late]  # row of the batch, what is wrong -> another image


class DeviceViews:
    """Makes the views `names` of `config`. Called from one thread, with one batch after another."""

    def __init__(
        self,
        config: ViewConfig,
        names: Sequence[str],
        device: torch.device,
        counts: DecodeCounts,
        decoder: DeviceDecoder | None = None,
    ) -> None:
        self._config, self._names, self._device, self._counts = config, names, device, counts
        self._decoder = device_decoder(device) if decoder is None else decoder
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, late: Sequence[Late], replace: Replace) -> dict[str, Tensor]:
        """The views, uint8 (B, height, width, 3) each, on the device and finished.

        For an image that cannot be decoded `replace` gives another one, until one can. Raises what
        it raises; DeviceDecodeError.
        """
        late = list(late)
        sizes = dict(zip(VIEWS, (self._config.size, self._config.token_size), strict=True))
        with torch.cuda.stream(self._stream):  # None: nothing
            views = {
                name: torch.empty(len(late), *sizes[name], 3, dtype=torch.uint8, device=self._device)
                for name in self._names
            }
            for rows in _parts([image.height * image.width for image, _ in late]):
                pixels = self._decoded(late, rows, replace)
                made = self._views(pixels, [draw for _, draw in late[rows]])
                for name, view in views.items():
                    view[rows] = made[name]
            if self._stream is not None:
                end = torch.cuda.Event(blocking=True)  # sleeps: the loader's threads want the core
                end.record()
                end.synchronize()
        return views

    def _decoded(self, late: list[Late], rows: slice, replace: Replace) -> list[Tensor]:
        """The pixels of those rows, (height, width, 3) each; `late` has what was replaced."""
        reasons = [image.why for image, _ in late[rows]]
        plain = [row for row in range(*rows.indices(len(late))) if late[row][0].pixels is None]
        decoded = dict(zip(plain, self._decoder([late[row][0] for row in plain]), strict=True))
        found = []
        for number, row in enumerate(range(*rows.indices(len(late)))):
            pixels, why = decoded.get(row) or (late[row][0].pixels, late[row][0].why)
            while isinstance(pixels, BadImageError):
                late[row] = replace(row, pixels)
                image = late[row][0]
                if image.pixels is None:
                    ((pixels, why),) = self._decoder([image])
                else:
                    pixels, why = image.pixels, image.why
            reasons[number] = why
            found.append(torch.as_tensor(pixels))
        self._counts.add(reasons)
        return found

    def _views(self, pixels: list[Tensor], draws: list[ViewDraw]) -> dict[str, Tensor]:
        sizes = torch.tensor([p.shape[:2] for p in pixels], dtype=torch.int32)
        num_values = sizes.prod(1, dtype=torch.int64) * 3
        jitters = [draw.jitter for draw in draws]
        numbers = [[STEPS.index(name) for name, _ in jitter] for jitter in jitters]
        factors = [[factor for _, factor in jitter] for jitter in jitters]
        made = ragged_views(
            torch.cat([p.to(self._device).reshape(-1) for p in pixels]),
            *(
                t.to(self._device)
                for t in (
                    num_values.cumsum(0) - num_values,
                    sizes,
                    torch.tensor([draw.box for draw in draws], dtype=torch.int32),
                    torch.tensor([draw.flip for draw in draws]),
                    torch.tensor(numbers, dtype=torch.int8).view(len(draws), -1),
                    torch.tensor(factors, dtype=torch.float32).view(len(draws), -1),
                )
            ),
            self._config.size,
            self._config.token_size,
        )
        return dict(zip(VIEWS, made, strict=True))


def taken(views: dict[str, Tensor]) -> None:
    """Say that the current stream reads them: their memory came from another stream, which must not
    have it again before this one has done what is now queued on it."""
    for view in views.values():
        if view.is_cuda:
            view.record_stream(torch.cuda.current_stream(view.device))


def _parts(pixels: Sequence[int]) -> list[slice]:
    """Rows that are decoded together, in turn: as many as have PIXELS_AT_ONCE, at least one."""
    parts, first, total = [], 0, 0
    for row, count in enumerate(pixels):
        if row > first and total + count > PIXELS_AT_ONCE:
            parts.append(slice(first, row))
            first, total = row, 0
        total += count
    return [*parts, slice(first, len(pixels))]
