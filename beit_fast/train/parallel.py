"""Training on several ranks: each has its own images, and gradients are averaged."""

import contextlib

from torch import nn

from beit_fast.train.world import World


def data_parallel(module: nn.Module, world: World) -> nn.Module:
    """`module`, or its DDP wrapper where there are several ranks.

    What `module` compiles for itself overlaps with the exchange all the same: inside DDP's forward
    Dynamo splits a graph at the buckets, so one is sent while the backward of the next part runs.
    """
    if world.size == 1:
        return module
    devices = [world.device.index] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def gradient_sync(module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
    """Exchange gradients on the last micro-batch of a step only."""
    if last or not isinstance(module, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()
