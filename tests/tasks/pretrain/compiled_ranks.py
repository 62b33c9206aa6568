"""A compiled pre-training step on torchrun's ranks: `compiled_ranks.py CONFIG OUTPUT`.

CONFIG is a pickled PretrainConfig. Each rank leaves, as Dynamo splits graphs for DDP and as it does
not ("whole"): which parts of the backward ran and which buckets were sent, in the order of the
profiler's trace, and the gradients.
"""

import functools
import pickle
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.profiler import ProfilerActivity, profile, record_function

from beit_fast.tasks.pretrain.config import PretrainConfig
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tokenizer.checkpoint import load_tokenizer
from beit_fast.train.parallel import Replicas
from beit_fast.train.task import TaskLoss
from beit_fast.train.world import World, open_world
from beit_fast_main import _end_rank

# Seconds before the profiler stops. Without them 5 of 10 runs ended in a segmentation fault as what
# it had found was freed. Not proven: gloo's thread notes the end of an exchange after it has told
# that it is done, and may write into what a profiler that stopped meanwhile has freed (torch 2.11).
SETTLING = 0.3
NAMES = {"CompiledFunctionBackward": "backward", "bucket": "bucket"}


class SmallBuckets(nn.parallel.DistributedDataParallel):
    """DDP with buckets of 1 MiB, for a model of a few."""

    def __init__(self, module: nn.Module, **options) -> None:
        super().__init__(module, bucket_cap_mb=1, **options)


def send(_, bucket):
    with record_function("bucket"):
        return allreduce_hook(None, bucket)


def trace(config: PretrainConfig, world: World) -> dict:
    torch._dynamo.reset()
    task = PretrainTask(config, load_tokenizer(config.tokenizer), world)
    task.model.train()
    task.compile("default")
    module = Replicas(config.run, world).wrap(TaskLoss(task))
    module.register_comm_hook(None, send)
    batches = task.batches(0)
    batch = task.prepare(next(batches))
    batches.close()
    for _ in range(2):  # DDP orders its buckets by the first step
        task.model.zero_grad()
        loss, _ = module(batch)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            loss.backward()
            time.sleep(SETTLING)
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return {
        "events": [NAMES[event.name] for event in events if event.name in NAMES],
        "gradients": {name: p.grad.clone() for name, p in task.model.named_parameters()},
    }


def main(config: Path, output: Path) -> None:
    torch.set_num_threads(1)
    nn.parallel.DistributedDataParallel = SmallBuckets
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    traces = {}
    with open_world("cpu") as world:
        for name, splits in (("split", True), ("whole", False)):
            with torch._dynamo.config.patch(optimize_ddp=splits):
                traces[name] = trace(pickle.loads(config.read_bytes()), world)
        torch.save(traces, output / f"{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    _end_rank(0)
