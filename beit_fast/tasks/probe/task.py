"""Probes of a frozen encoder: what do the features of each of its blocks know of labels?

Which features is the whole question. BEiT's last blocks are specialised to predict visual tokens
and its [CLS] token is never trained to say anything, so the last block's [CLS], where a supervised
ViT is best, is the wrong place: the paper's best blocks are the 9th of 12 and the 14th of 24, with
the mean of the patches (appendix D; with the last block users report a third of its accuracy). So
every block is probed, all in the same passes.

The linear probe is unilm's: [CLS] and mean of the patches, concatenated, without norm, a classifier
a block. Unlike there the features are of the centre crop and computed once, not of fresh crops
every epoch, which costs a pass of the encoder each. Learning rate, block and k are chosen on a part
of the training images; test images are only counted.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from beit_fast.data.sources.opening import labelled_images
from beit_fast.data.sources.subset import split
from beit_fast.data.views.statistics import STATISTICS
from beit_fast.files import replace_text
from beit_fast.model.beit import Beit
from beit_fast.tasks.evaluate.checkpoints import (
    UNSTATED,
    open_weights,
    opened_path,
    view_of,
    weights_digest,
)
from beit_fast.tasks.evaluate.evaluation import default_crop_pct
from beit_fast.tasks.probe.config import ProbeConfig
from beit_fast.tasks.probe.features import Features, cached_features
from beit_fast.tasks.probe.probes import knn_accuracy, linear_probes
from beit_fast.tasks.sources import describe_source, indexing, say
from beit_fast.train.log import plain_console
from beit_fast.train.preflight import check_writable
from beit_fast.train.state import environment
from beit_fast.train.stop import stop_signals
from beit_fast.train.world import World, open_world
from beit_fast.viz.layers import draw_layers
from beit_fast.weights.load import load_pretrained
from beit_fast.weights.read import Weights

POOLS = ("cls", "mean")  # the order in the features


def run_probe(config: ProbeConfig) -> dict[str, Any]:
    """Probe every block, print the table, write probe.json and probe.png to `config.output`.

    Returns what probe.json holds. Raises ValueError, OSError, BadDataError, Interrupted.
    """
    for name in ("checkpoint", "train", "test"):
        if not getattr(config, name):
            raise ValueError(f"no {name} was named: pass --{name} with a folder")
    with open_world(config.device, named="device") as world, stop_signals():
        if world.size > 1:
            raise ValueError(f"torchrun started {world.size} processes: a probe runs in one")
        check_writable(Path(config.output), "output")
        return _run(config, world)


def _run(config: ProbeConfig, world: World) -> dict[str, Any]:
    console = plain_console()
    random = config.weights == "random"
    given = {"img_size": config.img_size, "num_heads": config.num_heads}
    weights = open_weights(config.checkpoint, "model" if random else config.weights, **given)
    model, digest = load_encoder(weights, config.seed if random else None, config.img_size)
    if model.config.in_chans != 3:
        raise ValueError(
            f"{config.checkpoint} takes {model.config.in_chans} channels, images have 3"
        )
    model.to(world.device)
    data = {
        name: labelled_images(
            getattr(config, name),
            follow_links=config.follow_links,
            fewest=fewest,
            reads=config,
            progress=indexing(),
        )
        # Test images are read before anything is computed.
        for name, fewest in (("test", 1), ("train", 2))
    }
    for name, (source, _, classes) in data.items():
        say(f"{name}: {describe_source(source, classes)}", world)
    names = data["train"][2]
    if different := sorted(set(names) ^ set(data["test"][2])):
        raise ValueError(
            f"{config.train} and {config.test} have other classes; only one has "
            f"{', '.join(different[:5])}: give folders of the same classes"
        )
    if max(config.knn) > len(data["train"][1]) - len(split_rows(config, data["train"][1])[1]):
        raise ValueError(
            f"--knn asks for {max(config.knn)} neighbours, more than the images of {config.train} "
            "without those held out: give a smaller number"
        )
    view = view_of(config.checkpoint, model.config, said=weights.statistics)
    statistics = (view.mean, view.std)
    if config.statistics is not None:
        statistics = STATISTICS[config.statistics]
    elif view.origin == UNSTATED:
        console.print(
            f"{config.checkpoint} does not say the mean and std of its pixels: half is taken, as "
            "nearly all published BEiTs have; --statistics imagenet is the other"
        )
    crop_pct = config.crop_pct
    if crop_pct is None:
        crop_pct = default_crop_pct(model.config.image_pixels)
    # Heads that no tensor shows are not in the digest.
    asked = {} if config.num_heads is None else {"num_heads": config.num_heads}
    features = {}
    for name, (source, labels, _) in data.items():
        folder = Path(config.output) / "features" / name
        console.print(f"features of {len(source)} images of {name}, kept in {folder}")
        features[name] = cached_features(
            folder,
            model,
            source,
            labels,
            made_from={"weights": digest, "classes": names} | asked,
            statistics=statistics,
            crop_pct=crop_pct,
            precision=config.precision,
            batch_size=config.images_at_once,
            num_threads=config.num_threads,
            max_bad_share=config.max_bad_share if name == "train" else None,
            device=world.device,
            reads=config,
        )
    if left_out := features["train"].left_out:
        say(
            f"{len(left_out)} images could not be used and were left out: {', '.join(left_out)}",
            world,
        )
    result = probe_layers(features["train"], features["test"], len(names), config, world.device)
    result |= {
        "checkpoint": opened_path(config.checkpoint),
        "weights": config.weights,
        "classes": names,
        "num_train": len(features["train"].labels),
        "num_test": len(features["test"].labels),
        "left_out": features["train"].left_out,
        "environment": environment(),
    }
    output = Path(config.output)
    replace_text(output / "probe.json", json.dumps(result, indent=1))
    curves = {"linear, [CLS] and mean": [row["linear"] for row in result["layers"]]}
    k = result["chosen"]["knn"]["k"]
    for pool in POOLS:
        curves[f"{k}-NN, {_TITLES[pool]}"] = [row["knn"][pool][str(k)] for row in result["layers"]]
    draw_layers(curves, output / "probe.png", chance=1 / len(names))
    _show(result, output, console)
    return result


def probe_layers(
    train: Features, test: Features, num_classes: int, config: ProbeConfig, device: torch.device
) -> dict[str, Any]:
    """Accuracies of all probes of every layer, and which the held-out images choose."""
    rows, held_out = split_rows(config, train.labels)
    wide = {
        name: part.features.reshape(len(part.labels), part.features.shape[1], -1)
        for name, part in (("train", train), ("test", test))
    }
    probes = linear_probes(
        wide["train"],
        train.labels,
        num_classes,
        rates=config.rates,
        epochs=config.epochs,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        rows=rows,
        seed=config.seed,
        device=device,
    )
    chosen_by = probes.accuracy(wide["train"][held_out], train.labels[held_out])
    tested = probes.accuracy(wide["test"], test.labels)
    layers, neighbours = [], []
    for layer in range(wide["train"].shape[1]):
        best = int(chosen_by[:, layer].argmax())
        row = {
            "block": layer + 1,
            "linear": float(tested[best, layer]),
            "linear_held_out": float(chosen_by[best, layer]),
            "lr": config.rates[best],
            "knn": {},
            "knn_held_out": {},
        }
        for number, pool in enumerate(POOLS):
            bank = _tensor(train.features[:, layer, number], device)
            queries = _tensor(test.features[:, layer, number], device)
            labels, truth = train.labels.to(device), test.labels.to(device)
            held = knn_accuracy(
                bank[rows], labels[rows], bank[held_out], labels[held_out], config.knn
            )
            here = knn_accuracy(bank, labels, queries, truth, config.knn)
            row["knn_held_out"][pool] = {str(k): value for k, value in held.items()}
            row["knn"][pool] = {str(k): value for k, value in here.items()}
            neighbours += [(held[k], here[k], layer + 1, pool, k) for k in config.knn]
        layers.append(row)
    linear = max(layers, key=lambda row: row["linear_held_out"])
    _, accuracy, block, pool, k = max(neighbours, key=lambda entry: entry[0])
    return {
        "rates": list(config.rates),
        "layers": layers,
        "chosen": {
            "linear": {"block": linear["block"], "lr": linear["lr"], "accuracy": linear["linear"]},
            "knn": {"block": block, "pool": pool, "k": k, "accuracy": accuracy},
        },
    }


def split_rows(config: ProbeConfig, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training images to train on, and those held out."""
    return split(labels, config.held_out, config.seed)


def load_encoder(
    weights: Weights, seed: int | None = None, img_size: int | tuple[int, int] | None = None
) -> tuple[Beit, str]:
    """The encoder of a checkpoint of any task, without its head, and what identifies its weights.

    With a `seed` its weights are new ones; positions are resized to `img_size`. It is in eval mode
    and fp32.
    """
    torch.manual_seed(seed or 0)
    config = weights.config
    if img_size is not None:
        config = dataclasses.replace(config, img_size=img_size)
    model = Beit(config).eval()
    if seed is not None:
        return model, f"random, seed {seed}"
    load_pretrained(model, weights)
    return model, weights_digest({name: weights.state[name] for name in model.state_dict()})


_TITLES = {"cls": "[CLS]", "mean": "patch mean"}


def _show(result: dict[str, Any], output: Path, console: Console) -> None:
    layers, chosen = result["layers"], result["chosen"]
    ks = list(layers[0]["knn"]["mean"])
    table = Table(
        title=f"Accuracy on {result['num_test']} test images, {result['weights']} weights"
    )
    columns = ["block", "linear", "lr", *(f"{k}-NN\n{_TITLES[p]}" for p in POOLS for k in ks)]
    for column in columns:
        table.add_column(column, justify="right")
    for row in layers:
        knn = [f"{row['knn'][pool][k]:.1%}" for pool in POOLS for k in ks]
        style = "bold" if row["block"] == chosen["linear"]["block"] else None
        table.add_row(
            str(row["block"]), f"{row['linear']:.1%}", f"{row['lr']:g}", *knn, style=style
        )
    console.print(table)
    linear, knn = chosen["linear"], chosen["knn"]
    last = layers[-1]["knn"]["cls"][str(knn["k"])]
    say = console.out
    say("chosen on held-out training images, counted on test images:")
    say(f"  linear  {linear['accuracy']:.1%}  block {linear['block']}, lr {linear['lr']:g}")
    say(
        f"  kNN     {knn['accuracy']:.1%}  block {knn['block']}, {_TITLES[knn['pool']]}, "
        f"k = {knn['k']}"
    )
    say(
        f"The usual mistake is to judge a BEiT by [CLS] of its last block ({knn['k']}-NN: "
        f"{last:.1%}): no loss looks at [CLS],\n"
        "and the last blocks serve the prediction. Use the block and feature that held-out images "
        "choose,\nmostly the mean of the patches of a middle block."
    )
    if edge := [str(row["block"]) for row in layers if row["lr"] == max(result["rates"])]:
        say(
            f"The largest learning rate did best for block {', '.join(edge)}: larger ones may do "
            "better, add them to --rates"
        )
    for name in ("probe.json", "probe.png"):
        console.print(f"  {name:10}  {output / name}")


def _tensor(features: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(features)).to(device)
