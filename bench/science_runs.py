"""What the experiments of science.py share: arms, their runs, and what is made of the results."""

import argparse
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from beit_fast.tasks.pretrain.config import DvaeTrainingConfig
from beit_fast.tasks.pretrain.dvae import TOKENIZER, run_dvae
from beit_fast.train.config import RunConfig

SCRATCH = "from scratch"
BEIT = "BEiT"


@dataclass(frozen=True)
class Arm:
    """What is judged: a variant's weights with one seed, or with no variant random ones."""

    name: str
    seed: int
    work: Path
    shorten: int  # every run takes one step in so many

    @property
    def folder(self) -> Path:
        return self.work / f"seed{self.seed}" / self.name.replace(", ", "_").replace(" ", "_")

    @property
    def is_trained(self) -> bool:
        return self.name != SCRATCH


def arms_of(names: Iterable[str], options: argparse.Namespace) -> list[Arm]:
    """An arm for each seed and name."""
    return [
        Arm(name, seed, options.work, options.shorten)
        for seed in range(options.seeds)
        for name in names
    ]


def tokenizer_of(arm: Arm) -> Path:
    """The file of the seed's tokenizer."""
    return arm.work / f"seed{arm.seed}" / "tokenizer" / TOKENIZER


def train_tokenizer(arm: Arm, config: DvaeTrainingConfig) -> None:
    """The seed's, in its folder."""
    run_dvae(replace(config, run=shortened(config.run, arm, str(tokenizer_of(arm).parent))))


def shortened(run: RunConfig, arm: Arm, output: str) -> RunConfig:
    """The run in its own folder, with the arm's seed; one picture, one checkpoint."""
    length = {"steps": run.steps // arm.shorten} if run.steps else {"epochs": run.epochs}
    return replace(run, output=output, seed=arm.seed, device="cpu", save_every=10**9, **length)


# --- what runs in the workers ---------------------------------------------------------------------


@contextlib.contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """New processes, which do not take over what this one has imported and set."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield pool


def quietly(work: Callable[[Arm], object], arm: Arm) -> tuple[object, float]:
    """The result of a piece of work, whose output goes to a log, and its seconds."""
    torch.set_num_threads(1)
    arm.folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with (arm.folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        result = work(arm)
    return result, time.perf_counter() - begun


def run_all(pool: ProcessPoolExecutor, work: Callable[[Arm], object], arms: Iterable[Arm]) -> dict:
    """arm -> result, with a line for each as it is done."""
    futures = {arm: pool.submit(quietly, work, arm) for arm in arms}
    results = {}
    try:
        for arm, future in futures.items():
            results[arm], seconds = future.result()
            print(f"  {arm.name}, seed {arm.seed}: {seconds:.0f} s", flush=True)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return results


# --- what is made of the results ------------------------------------------------------------------


def choose(name: str, judged: dict) -> tuple[float, float]:
    """The setting with the best mean on validation images; the first of equally good ones."""
    grids = [result["grid"] for arm, result in judged.items() if arm.name == name]
    return max(grids[0], key=lambda setting: statistics.fmean(grid[setting] for grid in grids))


def summary(rows: list[dict], value: str) -> list[dict]:
    """Mean and standard deviation over seeds of the column `value`, of each variant and measure."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["measure"]), []).append(float(row[value]))
    return [
        {"variant": variant, "measure": name, "seeds": len(values)}
        | {"mean": statistics.fmean(values)}
        | {"std": statistics.stdev(values) if len(values) > 1 else float("nan")}
        for (variant, name), values in groups.items()
    ]
