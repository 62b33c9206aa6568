"""One of the ranks of `bench/checkpoint.py ranks`, which starts them by torchrun."""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint import model_of
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from beit_fast.files import file_digest
from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForMaskedImageModeling
from beit_fast.train.state import save_checkpoint

State = dict[str, dict[str, Tensor]]


def sharded_state(config: BeitConfig) -> State:
    """Weights of a model that FSDP2 has sharded block by block, and two moments of each."""
    model = BeitForMaskedImageModeling(config)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    kinds = ("exp_avg", "exp_avg_sq")
    moments = {f"{k}/{n}": torch.zeros_like(w) for k in kinds for n, w in weights.items()}
    for moment in moments.values():
        moment.to_local().normal_()
    return {"model": weights, "optimizer": moments}


def gathered(state: State) -> State:
    """Whole tensors on rank 0, nothing elsewhere; never more than one is whole on another rank."""
    whole: State = {}
    for stem, values in state.items():
        whole[stem] = {}
        for name, value in values.items():
            full = value.full_tensor()
            if dist.get_rank() == 0:
                whole[stem][name] = full
    return whole


def save_gathered(state: State, folder: Path) -> float:
    """Seconds until training may go on; a thread would do the rest."""
    begun = time.perf_counter()
    whole = gathered(state)
    stall = time.perf_counter() - begun
    if dist.get_rank() == 0:
        save_checkpoint(folder, 1, whole, {}, keep=1)
    return stall


def save_gathered_later(state: State, folder: Path) -> float:
    """Seconds until training may go on, once each rank has copied its own shards: they could be
    sent to rank 0 and written by threads. The whole tensors are as `gathered` has them."""
    begun = time.perf_counter()
    shards = [value for values in state.values() for value in values.values()]
    mine = torch.cat([value.to_local().flatten() for value in shards])
    stall = time.perf_counter() - begun
    ranks, rank = dist.get_world_size(), dist.get_rank()
    # Shares of FSDP2: of the first dimension, as torch.chunk gives them.
    rows = [[len(part) for part in torch.arange(v.shape[0]).chunk(ranks)] for v in shards]
    rows = [[*of_one, *[0] * (ranks - len(of_one))] for of_one in rows]
    widths = [math.prod(value.shape[1:]) for value in shards]
    sizes = [sum(n[r] * w for n, w in zip(rows, widths, strict=True)) for r in range(ranks)]
    longest = max(sizes)
    mine = torch.nn.functional.pad(mine, (0, longest - len(mine)))
    theirs = [torch.empty(longest) for _ in range(ranks)] if rank == 0 else None
    dist.gather(mine, theirs)
    if rank == 0:
        lengths = [[n[r] * w for n, w in zip(rows, widths, strict=True)] for r in range(ranks)]
        parts = [
            flat[: sum(of_rank)].split(of_rank)
            for flat, of_rank in zip(theirs, lengths, strict=True)
        ]
        whole = iter([torch.cat(part) for part in zip(*parts, strict=True)])
        tensors = {
            stem: {name: next(whole).view(value.shape) for name, value in values.items()}
            for stem, values in state.items()
        }
        save_checkpoint(folder, 1, tensors, {}, keep=1)
    return stall


def save_dcp(state: State, folder: Path) -> float:
    begun = time.perf_counter()
    dcp.save(state, checkpoint_id=folder)
    return time.perf_counter() - begun


def save_dcp_async(state: State, folder: Path) -> float:
    begun = time.perf_counter()
    future = dcp.async_save(state, checkpoint_id=folder)
    stall = time.perf_counter() - begun
    future.result()
    return stall


CANDIDATES: dict[str, Callable[[State, Path], float]] = {
    "gather": save_gathered,
    "gather-later": save_gathered_later,
    "dcp": save_dcp,
    "dcp-async": save_dcp_async,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size")
    parser.add_argument("folder", type=Path)
    parser.add_argument("rounds", type=int)
    parser.add_argument("answer", type=Path, help="file to write the rows to, as JSON")
    options = parser.parse_args()
    measure(options.size, options.folder, options.rounds, options.answer)
    return 0


def measure(size: str, folder: Path, rounds: int, answer: Path) -> None:
    dist.init_process_group("gloo")
    is_main = dist.get_rank() == 0
    state = sharded_state(model_of(size))
    assert all(isinstance(v, DTensor) for values in state.values() for v in values.values())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CANDIDATES}
    num_bytes, sha256_s, digests = {}, 0.0, {}
    order = list(CANDIDATES)
    for number in range(rounds + 1):
        for name in order:
            target = folder / name
            dist.barrier()
            begun = time.perf_counter()
            stall = CANDIDATES[name](state, target)
            dist.barrier()
            if number:  # the first is the warm-up
                times[name].append((1e3 * stall, 1e3 * (time.perf_counter() - begun)))
            if is_main:
                files = [path for path in target.rglob("*") if path.is_file()]
                num_bytes[name] = sum(path.stat().st_size for path in files)
                if name.startswith("gather"):
                    begun = time.perf_counter()
                    weights = sorted(path for path in files if path.suffix == ".safetensors")
                    digests[name] = [file_digest(path) for path in weights]
                    sha256_s = time.perf_counter() - begun
                shutil.rmtree(target)
        order.reverse()
        if is_main and digests["gather"] != digests["gather-later"]:
            raise ValueError("both ways to gather write the same weights, and files differ")
    if is_main:
        rows = []
        for name, pairs in times.items():
            stalls, totals = zip(*pairs, strict=True)
            rows.append(
                {
                    "candidate": name,
                    "ms": statistics.median(totals),
                    "low_ms": min(totals),
                    "high_ms": max(totals),
                    "stall_ms": statistics.median(stalls),
                    "stall_low_ms": min(stalls),
                    "stall_high_ms": max(stalls),
                    "GB": num_bytes[name] / 1e9,
                    "sha256_s": sha256_s if name.startswith("gather") else 0.0,
                }
            )
        answer.write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
