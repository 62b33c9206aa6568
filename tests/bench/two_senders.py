"""What two ranks send over gloo in a step, as JSON: `two_senders.py`, which starts them itself.

The kernel counts what a process writes; gloo writes to sockets, and a step to nothing else.
"""

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForMaskedImageModeling
from beit_fast.train.config import RunConfig
from beit_fast.train.parallel import gradient_sync, parallel
from beit_fast.train.world import World

B, CONFIG = 2, BeitConfig(img_size=32, embed_dim=128, depth=3, num_heads=2, vocab_size=512)
# parallel, gradient_dtype, micro-batches
CASES = (("ddp", "fp32", 1), ("ddp", "fp32", 3), ("ddp", "bf16", 1), ("fsdp", "fp32", 1),
         ("fsdp", "fp32", 3))  # fmt: skip


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = BeitForMaskedImageModeling(CONFIG)

    def forward(self) -> torch.Tensor:
        mask = torch.zeros(B, CONFIG.num_patches, dtype=torch.bool)
        mask[:, :2] = True
        index = mask.flatten().nonzero().flatten().int()
        tokens = torch.zeros(mask.shape, dtype=torch.long)
        loss, _ = self.model.loss(torch.ones(B, 3, 32, 32), mask, index, tokens)
        return loss


def written() -> int:
    """Bytes, so far."""
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if "wchar" in line)
    return int(line.split()[1])


def sent(work: Callable[[], object]) -> int:
    """By this rank, in `work`."""
    dist.barrier()
    before = written()
    work()
    return written() - before


def step_of(world: World, kind: str, dtype: str, micro_batches: int) -> Callable[[], None]:
    loss = Loss()
    run = RunConfig(output="nowhere", steps=1, parallel=kind, gradient_dtype=dtype)
    module = parallel(run, world, loss.model).wrap(loss, loss.model.blocks)

    def step() -> None:
        for number in range(micro_batches):
            with gradient_sync(module, last=number == micro_batches - 1):
                module().backward()

    step()  # DDP sorts its buckets after the first
    return step


def measure(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    world = World(rank, 2, torch.device("cpu"))
    found = {" ".join(map(str, case)): sent(step_of(world, *case)) for case in CASES}
    whole, part = torch.ones(2**20), torch.ones(2**19)
    found["all-reduce"] = sent(lambda: dist.all_reduce(whole)) / whole.nbytes
    found["gather"] = sent(lambda: dist.all_gather_into_tensor(whole, part)) / whole.nbytes
    found["reduce-scatter"] = sent(lambda: dist.reduce_scatter_tensor(part, whole)) / whole.nbytes
    model = BeitForMaskedImageModeling(CONFIG)
    for name, module in (("parameters", model), ("block parameters", model.blocks)):
        found[name] = sum(parameter.numel() for parameter in module.parameters())
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    torch.multiprocessing.start_processes(measure, (port,), nprocs=2, start_method="fork")


if __name__ == "__main__":
    sys.exit(main())
