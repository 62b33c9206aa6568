"""Batches on the device, copied while the step before still runs.

The host launches a step and asks for the next batch at once, while the device is at work: the copy,
on a stream of its own, goes on beside it.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Batch = dict[str, Tensor]
STEPS_IN_FLIGHT = 2  # one at work and one that waits behind it: the device is never idle


def device_batches(
    batches: Iterator[Batch],
    device: torch.device,
    prepare: Callable[[Batch], Batch],
    *,
    ahead: bool = False,
) -> Iterator[Batch]:
    """CPU batches moved to the device and prepared; closing this closes `batches`.

    `prepare` runs on the current stream, or with `ahead` on that of the copy, beside the step
    before: a tokenizer fills what the step leaves idle, and takes memory for a second batch.
    """
    try:
        if device.type != "cuda":
            yield from map(prepare, batches)
            return
        side = torch.cuda.Stream(device)
        for batch in batches:
            with torch.cuda.stream(side):
                moved = {k: v.pin_memory().to(device, non_blocking=True) for k, v in batch.items()}
                if ahead:
                    moved = prepare(moved)
            here = torch.cuda.current_stream(device)
            here.wait_stream(side)
            for tensor in moved.values():  # memory of one stream, read on another
                tensor.record_stream(here)
            yield moved if ahead else prepare(moved)
    finally:
        if hasattr(batches, "close"):
            batches.close()


class InFlight:
    """Steps that were launched and are not known to be done, at most STEPS_IN_FLIGHT.

    A graph is one launch, so without this the host would run some 30 steps ahead of the device,
    each with its batch in device memory. A CPU runs ahead of nothing and has no events.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts = device.type == "cuda"
        self._ends: deque[torch.cuda.Event] = deque()

    def add(self) -> None:
        """Note that a step was launched, and wait until there is room for the next."""
        if not self._counts:
            return
        end = torch.cuda.Event(blocking=True)  # sleeps: the loader's threads want the core
        end.record()
        self._ends.append(end)
        if len(self._ends) == STEPS_IN_FLIGHT:
            self._ends.popleft().synchronize()
