"""Does pre-training pay for segmentation? Of science.py: scenes of digits, mIoU.

A net of `beit-fast pretrain digit_scenes` learns from 2000 scenes without labels, and is fine-tuned
as `beit-fast segment digits` does it, on a few labelled scenes that every seed draws anew. From
scratch is the same net, with the same scenes in the same order and as many steps. Rate and layer
decay are of one grid for both, chosen by each side's mean mIoU over seeds on the scenes of
digit-scenes:valid; then those of digit-scenes:test are counted, once.
"""

import argparse
import io
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from science_runs import (
    BEIT,
    SCRATCH,
    Arm,
    arms_of,
    choose,
    run_all,
    shortened,
    tokenizer_of,
    train_tokenizer,
    workers,
)

from beit_fast.data.sources.digit_scenes import PALETTE, labelled_scenes
from beit_fast.recipes.digit_scenes import digit_scenes, segment_digits, tokenizer_digit_scenes
from beit_fast.tasks.pretrain.config import PretrainConfig
from beit_fast.tasks.pretrain.pipeline import run_pretraining
from beit_fast.tasks.segment.checkpoints import open_segmenter
from beit_fast.tasks.segment.config import SegmentConfig
from beit_fast.tasks.segment.config_evaluation import SegmenterSourceConfig
from beit_fast.tasks.segment.evaluation import Segmentation, read_pair
from beit_fast.tasks.segment.sliding import segment_image
from beit_fast.tasks.segment.task import run_segmentation
from beit_fast.viz.segmentation import colour

LABELLED = 100  # scenes
SEEDS = 3
# Learning rate, layer decay; 3e-3 was behind for both sides.
GRID = ((1e-2, 1.0), (1e-2, 0.75), (2e-2, 1.0))
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "segmentation.png"
SHOWN = "digit-scenes:test:10"  # whatever is drawn


def pretraining_of(arm: Arm) -> PretrainConfig:
    config = digit_scenes()
    return replace(
        config,
        tokenizer=str(tokenizer_of(arm)),
        tokenizer_training=None,
        run=shortened(config.run, arm, str(arm.folder)),
    )


def segmenting_of(arm: Arm, lr: float, decay: float, part: str) -> SegmentConfig:
    """Counted on `part`; a finished run is only counted again."""
    config = segment_digits()
    path = f"digit-scenes:train:{LABELLED}:{arm.seed}"
    return replace(
        config,
        data=replace(config.data, path=path, test=f"digit-scenes:{part}"),
        init=str(arm.folder) if arm.is_trained else None,
        optim=replace(config.optim, lr=lr),
        layer_decay=decay,
        run=shortened(config.run, arm, str(arm.folder / f"segmenting_{lr:g}_{decay:g}")),
    )


# --- what runs in the workers ---------------------------------------------------------------------


def train_and_judge(arm: Arm) -> dict:
    """Pre-train, if the arm is trained at all, and fine-tune over the grid, to choose by.

    mIoU by setting, and CPU seconds of it all. What came out is kept, and read the next time.
    """
    kept = arm.folder / "judged.json"
    known = {"grid": [], "cpu_seconds": 0.0}
    if kept.exists():
        known = json.loads(kept.read_text(encoding="utf-8"))
    grid = {(lr, decay): miou for lr, decay, miou in known["grid"]}
    for setting in [setting for setting in GRID if setting not in grid]:
        begun = time.process_time()
        if arm.is_trained:  # finished runs are not repeated
            train_tokenizer(arm, tokenizer_digit_scenes())
            run_pretraining(pretraining_of(arm))
        grid[setting] = run_segmentation(segmenting_of(arm, *setting, "valid")).raw.miou
        known["cpu_seconds"] += time.process_time() - begun
        known["grid"] = [[*setting, miou] for setting, miou in grid.items()]
        kept.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return {"grid": {setting: grid[setting] for setting in GRID}} | {"cpu": known["cpu_seconds"]}


def segmented(arm: Arm, chosen: dict[str, tuple[float, float]]) -> Segmentation:
    """The test scenes, by the run that is there already, with the setting that was chosen."""
    return run_segmentation(segmenting_of(arm, *chosen[arm.name], "test")).raw


# --- the experiment -------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> tuple[list[dict], float]:
    """A row for each arm, seed and measure, and the CPU minutes of all training. Draws PICTURE."""
    arms = arms_of((BEIT, SCRATCH), options)
    arms.sort(key=lambda arm: not arm.is_trained)  # the long ones first
    with workers(options.processes) as pool:
        print(f"pre-training, {len(GRID)} settings of fine-tuning")
        judged = run_all(pool, train_and_judge, arms)
        print("test scenes, with the settings that validation chose")
        chosen = {name: choose(name, judged) for name in (BEIT, SCRATCH)}
        tested = run_all(pool, partial(segmented, chosen=chosen), arms)
    rows = [
        {
            "variant": arm.name,
            "seed": arm.seed,
            "measure": name,
            "value": value,
            "validation": judged[arm]["grid"][chosen[arm.name]] if name == "mIoU" else "",
            "setting": "lr {:g} decay {:g}".format(*chosen[arm.name]),
        }
        for arm in arms
        for name, value in measures_of(tested[arm]).items()
    ]
    draw(arms, chosen, options.picture)
    return rows, sum(found["cpu"] for found in judged.values()) / 60


def measures_of(found: Segmentation) -> dict[str, float]:
    return {"mIoU": found.miou, "mAcc": found.macc, "aAcc": found.aacc}


def draw(arms: list[Arm], chosen: dict[str, tuple[float, float]], path: Path) -> Path:
    """Some test scenes, their truth, and what seed 0 of both sides says, a row for each."""
    from matplotlib.figure import Figure

    source, colours = labelled_scenes(SHOWN), np.array(PALETTE, np.uint8)
    pairs = [read_pair(source, index) for index in range(len(source))]
    images, labels = zip(*pairs, strict=True)
    rows = {"scene": [image.numpy() for image in images]}
    rows["truth"] = [colour(ids.numpy(), colours) for ids in labels]
    for arm in (arm for arm in arms if arm.seed == 0):
        run = segmenting_of(arm, *chosen[arm.name], "test").run.output
        found = open_segmenter(SegmenterSourceConfig(checkpoint=run))
        rows["pre-trained" if arm.is_trained else SCRATCH] = [
            colour(
                segment_image(found.model, image, found.slide, found.statistics, "fp32").numpy(),
                colours,
            )
            for image in images
        ]
    figure = Figure(figsize=(len(pairs) * 0.85 + 0.9, len(rows) * 0.85), layout="constrained")
    for axes_row, (name, pictures) in zip(
        figure.subplots(len(rows), len(pairs)), rows.items(), strict=True
    ):
        for axes, picture in zip(axes_row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(name, fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)
    return path
