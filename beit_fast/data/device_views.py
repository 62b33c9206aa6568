"""The views of kind gpu: from a batch of files and draws to pixels, on the device that trains.

    bytes --decoder--> images of many sizes --ragged_views--> images, token_images of one size

In a thread and on a stream of its own, beside the training step. What comes out is finished when it
is handed over: whoever takes it waits for nothing, and need only tell the allocator on which stream
it is read (`taken`).

Images are decoded some at a time, as many as have PIXELS_AT_ONCE: their memory does not grow with
the batch. Decoded pixels are three bytes each, there twice while they are packed, and once beside
the crops, whose pixels are four bytes each.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.device_decode import (
    DecodeCounts,
    DeviceDecodeError,
    DeviceDecoder,
    device_decoder,
)
from beit_fast.data.sources.decode import BadImageError
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.two_views import VIEWS, LateViews, ViewDraw
from beit_fast.errors import is_out_of_memory
from beit_fast.flags import flag
from beit_fast.kernels.input.ragged_views import STEPS, ragged_views

PIXELS_AT_ONCE = 2**27
# Row of the batch and what is wrong with its image -> another image in its place.
Replace = Callable[[int, BadImageError], LateViews]


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
        made = dict(
            zip(VIEWS, (("bicubic", config.size), ("lanczos", config.token_size)), strict=True)
        )
        self._views = {name: made[name] for name in names}
        self._device, self._counts = device, counts
        self._decoder = device_decoder(device) if decoder is None else decoder
        self._remedy = (  # here, for threads do not know the flags
            f"pass a smaller {flag('data.batch_size')}, or {flag('views.kind')} fast"
        )
        self._stream = _stream_of(device) if device.type == "cuda" else None

    def __call__(self, late: Sequence[LateViews], replace: Replace) -> dict[str, Tensor]:
        """The views, uint8 (B, height, width, 3) each, on the device and finished.

        For an image that cannot be decoded `replace` gives another one, until one can. Raises what
        it raises; DeviceDecodeError.
        """
        try:
            return self._all(list(late), replace)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            said = next(iter(str(error).splitlines()), "")[:200]
            raise DeviceDecodeError(
                f"the views of {len(late)} images found too little memory on {self._device} "
                f"({said or type(error).__name__}): {self._remedy}"
            ) from error

    def _all(self, late: list[LateViews], replace: Replace) -> dict[str, Tensor]:
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            views = {
                name: torch.empty(len(late), *size, 3, dtype=torch.uint8, device=self._device)
                for name, (_, size) in self._views.items()
            }
            plain = [row for row, views_of in enumerate(late) if views_of.jpeg is not None]
            for rows in _parts(plain, late):
                self._fill(views, late, rows, replace)
            if odd := [row for row, views_of in enumerate(late) if views_of.jpeg is None]:
                made = [[late[row].made[name] for row in odd] for name in views]
                _put(views, odd, [torch.from_numpy(np.stack(view)) for view in made])
            self._counts.add(views_of.why for views_of in late)
            if self._stream is not None:
                end = torch.cuda.Event(blocking=True)  # sleeps: the loader's threads want the core
                end.record()
                end.synchronize()
        return views

    def _fill(
        self,
        views: dict[str, Tensor],
        late: list[LateViews],
        rows: Sequence[int],
        replace: Replace,
    ) -> None:
        """Make the views of those rows. Apart, so that their pixels are gone before the next."""
        if pixels := self._decoded(late, rows, replace):
            made = self.made([*pixels.values()], [late[row].draw for row in pixels])
            _put(views, [*pixels], made)

    def _decoded(
        self, late: list[LateViews], rows: Sequence[int], replace: Replace
    ) -> dict[int, Tensor]:
        """The pixels of those rows, (3, height, width) each, but for those whose views are made
        already when `replace` has given another image. `late` is changed to what was decoded."""
        pixels: dict[int, Tensor] = {}
        while rows:
            found = self._decoder([late[row].jpeg for row in rows])
            for row, (decoded, why) in zip(rows, found, strict=True):
                if isinstance(decoded, BadImageError):
                    late[row] = replace(row, decoded)
                else:
                    pixels[row] = decoded
                    late[row] = dataclasses.replace(late[row], why=why)
            rows = [row for row in rows if row not in pixels and late[row].jpeg is not None]
        return pixels

    def made(self, pixels: Sequence[Tensor], draws: Sequence[ViewDraw]) -> list[Tensor]:
        """Views of images, uint8 (3, height, width) each in any place, in the order of `names`."""
        sizes = torch.tensor([p.shape[1:] for p in pixels])
        num_values = 3 * sizes.prod(1)
        planar = [p.is_contiguous() for p in pixels]  # or else pixel by pixel: both are decoded to
        steps = [[STEPS.index(name) for name, _ in draw.jitter] for draw in draws]
        factors = [[factor for _, factor in draw.jitter] for draw in draws]
        return ragged_views(
            torch.cat([_on(self._device, _flat(p)) for p in pixels]),
            num_values.cumsum(0) - num_values,
            sizes,
            torch.tensor([draw.box for draw in draws]),
            torch.tensor([draw.flip for draw in draws]),
            planar=torch.tensor(planar),
            steps=torch.tensor(steps, dtype=torch.int64),
            factors=torch.tensor(factors),
            views=[*self._views.values()],
        )


def late_views(sample: object, device: torch.device, counts: DecodeCounts) -> DeviceViews | None:
    """What makes the views of a sample of kind gpu; None where its threads make all of it."""
    view = getattr(sample, "view", None)
    if getattr(view, "kind", None) != "gpu":
        return None
    return DeviceViews(view, sample.names, device, counts)


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for all that is decoded on a device: the allocator keeps memory for each stream, and a
    run evaluates, and a cache is written, by new `DeviceViews` every time."""
    return torch.cuda.Stream(device)


def taken(views: dict[str, Tensor]) -> None:
    """Say that the current stream reads them: their memory came from another stream, which must not
    have it again before this one has done what is now queued on it."""
    for view in views.values():
        if view.is_cuda:
            view.record_stream(torch.cuda.current_stream(view.device))


def _flat(pixels: Tensor) -> Tensor:
    """The values of (3, height, width) as they lie in memory."""
    return (pixels if pixels.is_contiguous() else pixels.permute(1, 2, 0)).reshape(-1)


def _put(views: dict[str, Tensor], rows: list[int], made: Sequence[Tensor]) -> None:
    for view, part in zip(views.values(), made, strict=True):
        view[_on(view.device, torch.tensor(rows))] = _on(view.device, part)


def _on(device: torch.device, values: Tensor) -> Tensor:
    """There, by a copy that the host does not wait for: it would spin until all is decoded."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _parts(rows: Sequence[int], late: Sequence[LateViews]) -> list[list[int]]:
    """Rows that are decoded together, in turn: as many as have PIXELS_AT_ONCE, at least one."""
    parts, total = [], PIXELS_AT_ONCE
    for row in rows:
        count = late[row].jpeg.height * late[row].jpeg.width
        if total + count > PIXELS_AT_ONCE:
            parts.append([])
            total = 0
        parts[-1].append(row)
        total += count
    return parts
