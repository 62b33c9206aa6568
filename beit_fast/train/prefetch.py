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
    """Batches moved to the device, what is not there yet, and prepared; closing this closes
    `batches`.

    `prepare` runs on the current stream, or with `ahead` on that of the copy, beside the step
    before: a tokenizer fills what the step leaves idle, and takes memory for a second batch.
    """
    try:
        if device.type != "cuda":
            yield from map(prepare, batches)
            return
        side = torch.cuda.Stream(device)
        while True:
            with torch.cuda.stream(side):  # which a loader told that reads what it made there
                if (batch := next(batches, None)) is None:
                    return
                moved = {k: _moved(v, device) for k, v in batch.items()}
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


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, where a loader may have made it."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


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
