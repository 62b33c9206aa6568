"""Does pre-training pay? The method and the paper's Table 4 in small, on real digits, on a CPU.

    python bench/science.py evidence             # pre-trained against from scratch
    python bench/science.py table4               # variants of the objective; after `evidence`
    python bench/science.py segmentation         # scenes of digits: science_segmentation.py

A net of `beit-fast pretrain digits` learns from 997 images without labels, and is then judged three
ways, each with several seeds: fine-tuned with 10 labels a class (every seed draws its own), and
frozen, by a linear probe and by nearest neighbours, both with all 997 labels. From scratch is the
same net, fine-tuned the same way with the same labels in the same order; frozen, it has its random
weights. Every seed has a tokenizer of its own, which the variants of Table 4 share.

What is chosen is chosen without test images: learning rate and layer decay of fine-tuning from one
grid for both sides, and a smaller one for all variants, by the mean over seeds of the accuracy on
300 validation images; the probes' rate, block and k on held-out training images. Then the 500 test
images are counted. Finished runs are kept below --work and not repeated: then no time is stated.
The picture is of all that was measured.
"""

import argparse
import csv
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import science_segmentation
import torch
from science_runs import (
    BEIT,
    SCRATCH,
    Arm,
    arms_of,
    choose,
    run_all,
    shortened,
    summary,
    tokenizer_of,
    train_tokenizer,
    workers,
)
from timing import RESULTS, conditions, conditions_line, format_table, write_results

from beit_fast.recipes.digits import digits, finetune_digits, probe_digits, tokenizer_digits
from beit_fast.tasks.finetune.config import FinetuneConfig
from beit_fast.tasks.finetune.task import run_finetuning
from beit_fast.tasks.pretrain.config import PretrainConfig
from beit_fast.tasks.pretrain.pipeline import run_pretraining
from beit_fast.tasks.probe.config import ProbeConfig
from beit_fast.tasks.probe.task import run_probe

LABELS = 10  # of each class
RATES = (3e-3, 1e-2)  # learning rates of fine-tuning; 1e-3 was behind for both sides
DECAYS = (0.75, 1.0)  # of the rate, from a layer to the one before
GRIDS = {
    "evidence": tuple(itertools.product(RATES, DECAYS)),
    "table4": (
        (3e-3, 1.0),
        (1e-2, 0.75),
    ),  # the best of BEiT on validation images, and one with decay
}
SEGMENTATION = "segmentation"  # has a file of its own
MEASURES = ("fine-tuned", "linear", "kNN")


@dataclass(frozen=True)
class Variant:
    """A row of the paper's Table 4, and what it changes."""

    paper: float  # top-1 on ImageNet-1K
    masking: str = "block"
    predict: str = "tokens"
    objective: str = "masked"


VARIANTS = {
    BEIT: Variant(82.86),
    "random masking": Variant(82.77, masking="random"),
    "pixels": Variant(81.04, predict="pixels"),
    "pixels, random masking": Variant(80.50, masking="random", predict="pixels"),
    "all tokens": Variant(82.59, objective="all"),
    "all tokens, no masking": Variant(81.67, objective="all_unmasked"),
}


def pretraining_of(arm: Arm) -> PretrainConfig:
    config, variant = digits(), VARIANTS[arm.name]
    predicts_tokens = variant.predict == "tokens"
    return replace(
        config,
        model=replace(config.model, predict=variant.predict),
        masking=replace(config.masking, strategy=variant.masking),
        objective=variant.objective,
        tokenizer=str(tokenizer_of(arm)) if predicts_tokens else None,
        tokenizer_training=None,
        run=shortened(config.run, arm, str(arm.folder)),
    )


def finetuning_of(arm: Arm, lr: float, decay: float, part: str) -> FinetuneConfig:
    """Counted on `part`; a finished run is only counted again."""
    config = finetune_digits()
    output = str(arm.folder / f"finetuned_{lr:g}_{decay:g}")
    data = replace(config.data, path=f"digits:train:{LABELS}:{arm.seed}", test=f"digits:{part}")
    return replace(
        config,
        data=data,
        init=str(arm.folder) if arm.is_trained else None,
        optim=replace(config.optim, lr=lr),
        layer_decay=decay,
        run=shortened(config.run, arm, output),
    )


def finetuned_accuracy(arm: Arm, lr: float, decay: float, part: str) -> float:
    return run_finetuning(finetuning_of(arm, lr, decay, part)).raw.top1


def probing_of(arm: Arm) -> ProbeConfig:
    """Of the arm's own weights; random ones take their shapes from the run of BEiT."""
    run = arm if arm.is_trained else replace(arm, name=BEIT)
    return replace(
        probe_digits(),
        checkpoint=str(run.folder),
        output=str(arm.folder / "probe"),
        weights="model" if arm.is_trained else "random",
        seed=arm.seed,
        device="cpu",
    )


def probed(arm: Arm) -> dict[str, dict]:
    """What the probes chose, and its accuracy: by measure."""
    chosen = run_probe(probing_of(arm))["chosen"]
    return {"linear": chosen["linear"], "kNN": chosen["knn"]}


# --- what runs in the workers ---------------------------------------------------------------------


def train_and_judge(arm: Arm, settings: Sequence[tuple[float, float]]) -> dict:
    """Pre-train, if the arm is trained at all; probe; fine-tune over the grid, to choose by.

    What came out is kept, and read the next time.
    """
    kept = arm.folder / "judged.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    grid = {(lr, decay): top1 for lr, decay, top1 in known.get("grid", [])}
    if missing := [setting for setting in settings if setting not in grid]:
        if arm.is_trained:
            run_pretraining(pretraining_of(arm))
        grid |= {setting: finetuned_accuracy(arm, *setting, "valid") for setting in missing}
    probes = known.get("probes") or probed(arm)
    content = {"grid": [[*setting, top1] for setting, top1 in grid.items()], "probes": probes}
    kept.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return {"grid": {setting: grid[setting] for setting in settings}, "probes": probes}


def test_accuracy(arm: Arm, chosen: dict[str, tuple[float, float]]) -> float:
    """Of the run that is there already, with the setting that was chosen."""
    return finetuned_accuracy(arm, *chosen[arm.name], "test")


# --- the experiments ------------------------------------------------------------------------------


def measure(names: list[str], options: argparse.Namespace) -> list[dict]:
    """A row for each arm, seed and measure."""
    settings = GRIDS[options.what]
    arms = arms_of(names, options)
    with workers(options.processes) as pool:
        print("tokenizers")
        train = partial(train_tokenizer, config=tokenizer_digits())
        run_all(pool, train, dict.fromkeys(replace(arm, name=BEIT) for arm in arms))
        # Random weights take their shapes from a run, so trained arms go first.
        trained = [arm for arm in arms if arm.is_trained]
        judged = {}
        for some in (trained, [arm for arm in arms if not arm.is_trained]):
            if some:
                print(f"pre-training, {len(settings)} fine-tuning settings, probes")
                judged |= run_all(pool, partial(train_and_judge, settings=settings), some)
        print("test images, with the settings that validation chose")
        chosen = {name: choose(name, judged) for name in names}
        tested = run_all(pool, partial(test_accuracy, chosen=chosen), arms)
    rows = []
    for arm in arms:
        lr, decay = chosen[arm.name]
        paper = VARIANTS[arm.name].paper if arm.is_trained else ""
        shared = {"variant": arm.name, "paper": paper, "seed": arm.seed}
        setting = f"lr {lr:g} decay {decay:g}"
        valid = judged[arm]["grid"][lr, decay]
        rows.append(
            shared
            | {"measure": "fine-tuned", "accuracy": tested[arm]}
            | {"validation": valid, "setting": setting}
        )
        for name, found in judged[arm]["probes"].items():
            kept = " ".join(f"{k} {v}" for k, v in found.items() if k != "accuracy")
            rows.append(
                shared
                | {"measure": name, "accuracy": found["accuracy"]}
                | {"validation": "", "setting": kept}
            )
    return rows


def draw(folder: Path) -> Path:
    """A panel for each measure and a row for each variant, every seed a dot, as science.png."""
    from matplotlib.figure import Figure

    rows = []
    for what in ("table4", "evidence"):
        if (path := folder / f"science-{what}.csv").exists():
            with path.open(newline="", encoding="utf-8") as file:
                known = {row["variant"] for row in rows}
                rows += [row for row in csv.DictReader(file) if row["variant"] not in known]
    names = list(dict.fromkeys(row["variant"] for row in rows))[::-1]
    figure = Figure(figsize=(9, 1.0 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, name in zip(panels, MEASURES, strict=True):
        mine = [row for row in rows if row["measure"] == name]
        axes.plot(
            [100 * float(row["accuracy"]) for row in mine],
            [names.index(row["variant"]) for row in mine],
            "o",
            alpha=0.4,
        )
        for found in summary(mine, "accuracy"):
            axes.plot(100 * found["mean"], names.index(found["variant"]), "k|", markersize=14)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("test accuracy, %")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    figure.savefig(path := folder / "science.png", dpi=100)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=(*GRIDS, SEGMENTATION))
    parser.add_argument(
        "--seeds", type=int, help=f"5; of {SEGMENTATION} {science_segmentation.SEEDS}"
    )
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/science"), help="folder of runs")
    parser.add_argument("--shorten", type=int, default=1, help="train one step in so many, to try")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument(
        "--picture", type=Path, default=science_segmentation.PICTURE, help=f"of {SEGMENTATION}"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun, path = time.perf_counter(), options.output / f"science-{options.what}.csv"
    if options.what == SEGMENTATION:
        options.work /= SEGMENTATION
        options.seeds = options.seeds or science_segmentation.SEEDS
        resumed = options.work.exists()
        rows, cpu_minutes = science_segmentation.measure(options)
        settings = {"cpu_minutes": f"{cpu_minutes:.1f}"}
        settings |= {"labelled_scenes": science_segmentation.LABELLED}
    else:
        options.seeds, resumed = options.seeds or 5, options.work.exists()
        names = [BEIT, SCRATCH] if options.what == "evidence" else list(VARIANTS)
        rows, settings = measure(names, options), {"labels_per_class": LABELS}
    values = conditions(
        torch.device("cpu"),
        ("scikit-learn",),
        processes=options.processes,
        minutes="" if resumed else f"{(time.perf_counter() - begun) / 60:.1f}",
        **settings,
        shorten=options.shorten,
    )
    write_results(path, rows, values)
    if options.what == SEGMENTATION:
        table, picture = summary(rows, "value"), options.picture
    else:
        table, picture = summary(rows, "accuracy"), draw(options.output)
    print(f"\n{conditions_line(values)}\n\n{format_table(table)}", path, picture, sep="\n")


if __name__ == "__main__":
    main()
