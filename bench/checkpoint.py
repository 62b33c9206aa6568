"""What a checkpoint costs: how long training stands for it, and how several ranks save.

    python bench/checkpoint.py stall [--size base large] [--folder DIR] [--rounds 7]
    python bench/checkpoint.py ranks [--size base] [--folder DIR] [--rounds 5]

stall   A loop of steps, each some products of matrices, and one save in it: of weights and two
        moments of each, random numbers. Candidates: no save, one that the loop waits for
        (run.save_async false), one that a thread writes. `stall_ms` is how much longer the loop
        took than without a save, in the same round; the loop is about three times as long as a
        save takes, and waits at its end for what is not written. `call_ms` is the call alone: the
        copy to host memory.
ranks   Two ranks over gloo hold a model that FSDP2 has sharded, with its moments. Candidates:
        `gather` to whole tensors on rank 0, which writes them as this project does;
        `gather-later`, where each rank copies its shards and sends the copy to rank 0; and what
        torch.distributed.checkpoint does with the shards, `dcp`, and `dcp-async` beside training.
        `stall_ms` is what training stands for if what can is done beside it, `ms` until all is on
        the disk. Without SHA-256 for dcp, which has none; `sha256_s` says how much of gather's
        time that is.

Files go to --folder (a new folder below it, removed at the end): name the disk of the runs. What a
GPU's copy takes is measured with --device cuda. Results: bench/results/checkpoint-<part>-*.csv.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from records import Records
from timing import (
    RESULTS,
    Timing,
    conditions,
    conditions_line,
    format_table,
    synchronize,
    time_interleaved,
)
from torch import Tensor

from beit_fast.files import file_digest
from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.model.heads import BeitForMaskedImageModeling
from beit_fast.train import saving
from beit_fast.train.saving import Saver
from beit_fast.train.state import checkpoint_paths
from beit_fast.train.world import World

SIZES = ("tiny", "small", "base", "large")  # tiny: to try this file
STEP_MS = 50  # about, of the loop
RANKS = 2


def model_of(size: str) -> BeitConfig:
    if size == "tiny":
        return BeitConfig(img_size=32, embed_dim=32, depth=2, num_heads=2, vocab_size=64)
    return beit_config(f"beit_{size}_patch16_224_8k_vocab")


def random_state(config: BeitConfig, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Tensors of the shapes of a run's: weights and two moments of each, fp32."""
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in BeitForMaskedImageModeling(config).named_parameters()}
    state: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, shape in shapes.items():
        state["model"][name] = torch.randn(shape, device=device)
        for kind in ("exp_avg", "exp_avg_sq"):
            state["optimizer"][f"{kind}/{name}"] = torch.randn(shape, device=device)
    return state


class Step:
    """Products of matrices that take about STEP_MS."""

    def __init__(self, device: torch.device) -> None:
        side = 8192 if device.type == "cuda" else 512
        self._a, self._b = (torch.randn(side, side, device=device) for _ in range(2))
        self._num = 1
        self()
        begun = time.perf_counter()
        for _ in range(3):
            self()
        self._num = max(1, round(STEP_MS / 1e3 / ((time.perf_counter() - begun) / 3)))

    def __call__(self) -> None:
        for _ in range(self._num):
            self._a @ self._b
        synchronize()


class Loop:
    """So many steps, and after the first a save of one kind; notes what the parts took."""

    def __init__(self, step: Step, state: dict, saver: Saver | None) -> None:
        self._step, self._state, self._saver = step, state, saver
        self.num_steps = 2
        self.call_ms: list[float] = []

    def __call__(self) -> None:
        self._step()
        if self._saver is not None:
            begun = time.perf_counter()
            self._saver.save(1, self._state)
            self.call_ms.append(1e3 * (time.perf_counter() - begun))
        for _ in range(self.num_steps - 1):
            self._step()
        if self._saver is not None:
            self._saver.wait()


def measure_stall(config: BeitConfig, device: torch.device, folder: Path, rounds: int) -> list:
    """A row for each way to save, see above."""
    state, step = random_state(config, device), Step(device)
    num_bytes = sum(v.nbytes for values in state.values() for v in values.values())
    written: list[float] = []
    world = World(0, 1, device)
    loops = {"none": Loop(step, state, None)}
    savers = []
    with timed_writes(written):
        for name, beside in (("waits", False), ("beside", True)):
            saver = Saver(folder / name, {}, keep=1, world=world, beside=beside)
            savers.append(saver)
            loops[name] = Loop(step, state, saver)
            loops[name]()  # how long a save takes is known then
        for loop in loops.values():
            loop.num_steps = max(3, round(3 * max(written) / (STEP_MS / 1e3)))
            loop.call_ms.clear()
        written.clear()
        timings = time_interleaved(loops, device=device, rounds=rounds, warmup=1, wall=True)
        for saver in savers:
            with saver:
                pass
    (checkpoint,) = checkpoint_paths(folder / "beside")
    begun = time.perf_counter()
    for path in checkpoint.iterdir():
        file_digest(path)
    sha256_s = time.perf_counter() - begun
    write_s = statistics.median(written)
    rows = []
    for name, timing in timings.items():
        stalls = Timing(
            tuple(
                mine - alone
                for mine, alone in zip(timing.rounds_ms, timings["none"].rounds_ms, strict=True)
            )
        )
        saves = name != "none"
        rows.append(
            {
                "candidate": name,
                "ms": timing.median_ms,
                "spread": timing.spread,
                "steps": loops[name].num_steps,
                "stall_ms": stalls.median_ms if saves else 0.0,
                "stall_low_ms": min(stalls.rounds_ms) if saves else 0.0,
                "stall_high_ms": max(stalls.rounds_ms) if saves else 0.0,
                "call_ms": statistics.median(loops[name].call_ms) if saves else 0.0,
                "GB": num_bytes / 1e9 if saves else 0.0,
                "write_s": write_s if saves else 0.0,
                "GB_per_s": num_bytes / 1e9 / write_s if saves else 0.0,
                "sha256_s": sha256_s if saves else 0.0,
            }
        )
    return rows


class timed_writes:  # noqa: N801  (a context, used as one)
    """Inside, seconds of every `save_checkpoint` of a saver are appended to a list."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds, self._real = seconds, saving.save_checkpoint

    def __enter__(self) -> None:
        def timed(*args: object, **more: object) -> Path:
            begun = time.perf_counter()
            try:
                return self._real(*args, **more)
            finally:
                self._seconds.append(time.perf_counter() - begun)

        saving.save_checkpoint = timed

    def __exit__(self, *_: object) -> None:
        saving.save_checkpoint = self._real


def measure_ranks(size: str, folder: Path, rounds: int) -> list[dict]:
    """A row for each way two ranks save; they are started here."""
    script = Path(__file__).with_name("checkpoint_ranks.py")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    answer = folder / "rows.json"
    subprocess.run(
        [sys.executable, *launch, str(script), size, str(folder), str(rounds), str(answer)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    return json.loads(answer.read_text())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["stall", "ranks"])
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["base"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="torch's, each rank's")
    parser.add_argument("--output", type=Path, help="default: in bench/results")
    options = parser.parse_args(arguments)
    if options.part == "ranks" and options.device != "cpu":
        parser.error("ranks are over gloo on a CPU: leave out --device")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    values = conditions(device, ("safetensors",), rounds=options.rounds)
    path = options.output or RESULTS / f"checkpoint-{options.part}-{device.type}.csv"
    records = Records(path, values, ("size", "candidate"))
    print(conditions_line(values))
    for size in options.size:
        load = round(os.getloadavg()[0], 1)  # of the minute before: whether the machine was quiet
        folder = Path(tempfile.mkdtemp(prefix="checkpoint_", dir=options.folder))
        try:
            if options.part == "stall":
                rows = measure_stall(model_of(size), device, folder, options.rounds)
            else:
                rows = measure_ranks(size, folder, options.rounds)
        finally:
            shutil.rmtree(folder)
        rows = [{"size": size, **row, "load": load} for row in rows]
        print(format_table(rows), flush=True)
        records.add(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
