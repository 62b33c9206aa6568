"""Counting: against a loop of one image, over batches and ranks, and where scores are equal."""

import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from beit_fast.data.sources.class_folders import class_folders
from beit_fast.tasks.evaluate.evaluation import (
    default_crop_pct,
    evaluate_classifier,
    ranks_of_labels,
)
from beit_fast.train.world import World
from labelled_images import write_class_folders
from task_runs import ALONE, TWO_RANKS
from tiny_classifier import TINY_CLASSIFIER, tiny_classifier

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def evaluate(model, folder, **changes):
    source, labels, _ = class_folders(folder)
    arguments = {
        "num_classes": 7,
        "statistics": HALF,
        "crop_pct": 0.8,
        "precision": "fp32",
        "batch_size": 4,
        "num_threads": 2,
        "world": ALONE,
    }
    return evaluate_classifier(model, source, labels * 2, **arguments | changes)


def test_it_counts_what_a_loop_over_single_images_counts(folder):
    """torchvision's resize and crop, fp64 logits, topk: nothing of ours but the model."""
    model = tiny_classifier().train()
    result = evaluate(model, folder)
    assert model.training  # as it was
    reference = tiny_classifier().double().eval()
    resize = v2.Compose(
        [v2.Resize(20, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)]
    )
    source, labels, _ = class_folders(folder)
    losses, hits, hits5, correct = [], 0, 0, [0] * 7
    for index, label in enumerate((labels * 2).tolist()):
        pixels = np.array(resize(Image.open(source.name(index)).convert("RGB")))
        images = (torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255 - 0.5) / 0.5
        with torch.no_grad():
            logits = reference(images)[0]
        losses.append(F.cross_entropy(logits, torch.tensor(label)).item())
        best = logits.topk(5).indices.tolist()
        hits, hits5 = hits + (best[0] == label), hits5 + (label in best)
        correct[label] += best[0] == label
    assert 0 < hits < 15 or hits5 < 15  # else nothing is told apart
    assert (result.num_images, result.top1, result.top5) == (15, hits / 15, hits5 / 15)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.images_per_class.tolist() == [5, 0, 5, 0, 5, 0, 0]
    assert result.correct_per_class.tolist() == correct
    assert result.images_per_second > 0


def test_batches_change_no_count(folder):
    model = tiny_classifier()
    whole, single = (evaluate(model, folder, batch_size=size) for size in (15, 1))
    assert (whole.top1, whole.top5) == (single.top1, single.top5)
    assert whole.correct_per_class.equal(single.correct_per_class)
    assert whole.loss == pytest.approx(single.loss, rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_what_the_cpu_counts(folder):
    world = World(0, 1, torch.device("cuda"))
    there = evaluate(tiny_classifier().to("cuda"), folder, world=world)
    here = evaluate(tiny_classifier(), folder)
    assert (there.top1, there.top5) == (here.top1, here.top5)
    assert there.correct_per_class.equal(here.correct_per_class)
    assert there.loss == pytest.approx(here.loss, rel=1e-5)


def test_bf16_is_computed_in_bf16_and_its_loss_in_fp32(folder):
    model = tiny_classifier()
    kinds = []
    model.head.register_forward_hook(lambda _m, _i, out: kinds.append(out.dtype))
    exact, rounded = (evaluate(model, folder, precision=p) for p in ("fp32", "bf16"))
    assert set(kinds) == {torch.float32, torch.bfloat16}
    assert exact.loss != rounded.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.05)


def test_equal_scores_are_no_hits_and_nan_never_is():
    zeros = torch.zeros(7, 7)
    assert ranks_of_labels(zeros, torch.arange(7)).tolist() == list(range(7))
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, float("nan"), 2.0], [float("nan")] * 3])
    assert ranks_of_labels(logits, torch.tensor([2, 2, 0])).tolist() == [1, 1, 3]
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(64, 9, generator=generator), torch.arange(64) % 9
    order = logits.argsort(1, descending=True)
    assert (order.gather(1, ranks_of_labels(logits, labels)[:, None])[:, 0] == labels).all()


def test_with_fewer_than_five_classes_top5_is_all_of_them(folder):
    model = tiny_classifier(replace(TINY_CLASSIFIER, num_classes=3))
    source, labels, _ = class_folders(folder)
    result = evaluate_classifier(
        model,
        source,
        labels,
        num_classes=3,
        statistics=HALF,
        crop_pct=1.0,
        precision="fp32",
        batch_size=8,
        num_threads=1,
        world=ALONE,
    )
    assert result.top5 == 1.0 > result.top1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 3}, "scores 7 classes, the images have 3"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "4 labels for 15 images"),
        ({"labels": torch.full((15,), 7)}, "labels from 7 to 7: pass classes 0 to 6"),
    ],
)
def test_labels_that_do_not_fit_are_refused(folder, change, message):
    source, labels, _ = class_folders(folder)
    labels = change.pop("labels", labels)
    arguments = {"num_classes": 7, "statistics": HALF, "crop_pct": 1.0, "precision": "fp32"}
    arguments |= {"batch_size": 4, "num_threads": 1, "world": ALONE}
    with pytest.raises(ValueError, match=message):
        evaluate_classifier(tiny_classifier(), source, labels, **arguments | change)


def test_an_image_that_cannot_be_read_is_named_and_the_mode_restored(tmp_path):
    broken = write_class_folders(tmp_path / "broken", 2, seed=0)
    (broken / "red" / "1.png").write_bytes(b"no image")
    model = tiny_classifier().train()
    with pytest.raises(ValueError, match=r"cannot use .*red/1.png .*repair or remove"):
        evaluate(model, broken)
    assert model.training


def two_ranks(folder: Path, output: Path) -> list:
    """What each of two gloo ranks saw: results, an error, and the images it read."""
    script = Path(__file__).with_name("evaluate_ranks.py")
    output.mkdir()
    support = str(script.parents[2] / "support")
    subprocess.run(
        [*TWO_RANKS, str(script), str(folder), str(output)],
        env={**os.environ, "PYTHONPATH": support},
        check=True,
        timeout=120,
        capture_output=True,
    )
    return [torch.load(output / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_ranks_count_every_image_once_also_where_one_has_none(folder, tmp_path):
    first, second = two_ranks(folder, tmp_path / "two")
    alone = asdict(evaluate(tiny_classifier(), folder))
    for result in (first["all"], second["all"]):
        assert (result["num_images"], result["top1"], result["top5"]) == (
            15,
            alone["top1"],
            alone["top5"],
        )
        assert result["correct_per_class"].equal(alone["correct_per_class"])
        assert result["images_per_class"].equal(alone["images_per_class"])
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert first["read"]["all"] + second["read"]["all"] == list(range(15))
    assert first["one"]["num_images"] == second["one"]["num_images"] == 1
    assert sorted([first["read"]["one"], second["read"]["one"]]) == [[], [0]]
    for errors in (first["error"], second["error"]):  # of rank 1's image, met by both
        assert "cannot use" in errors
        assert "14" in errors


def test_the_crop_is_the_originals_by_resolution():
    assert [default_crop_pct(size) for size in (224, (224, 320))] == [0.875, 0.875]
    assert [default_crop_pct(size) for size in (384, (224, 384), 512)] == [1, 1, 1]
