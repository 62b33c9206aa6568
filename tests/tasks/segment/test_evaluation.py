"""One confusion matrix over the set: against torchmetrics, by hand, and over ranks."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassJaccardIndex,
)

from beit_fast.labels import IGNORE
from beit_fast.tasks.segment.config_evaluation import SlideConfig
from beit_fast.tasks.segment.evaluation import (
    Segmentation,
    confusion_of,
    evaluate_segmenter,
    read_ahead,
    read_pair,
)
from beit_fast.tasks.segment.sliding import segment_image
from beit_fast.train.stop import Interrupted, stop_signals
from beit_fast.train.world import World
from labelled_pixels import Pairs, PatchModel, encoded
from task_runs import ALONE, TWO_RANKS

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def evaluate(model, source, **changes):
    arguments = {
        "slide": SlideConfig(),
        "statistics": HALF,
        "precision": "fp32",
        "num_threads": 2,
        "world": ALONE,
    }
    return evaluate_segmenter(model, source, **arguments | changes)


def test_measures_are_torchmetrics_over_the_whole_set():
    model, source = PatchModel().train(), Pairs(6)
    found = evaluate(model, source)
    assert model.training  # as it was
    assert sorted(source.reads) == list(range(6))
    num_classes, ignored = 5, 255
    options = {"num_classes": num_classes, "ignore_index": ignored}
    matrix = MulticlassConfusionMatrix(**options)
    iou = MulticlassJaccardIndex(average="none", **options)
    mean = MulticlassJaccardIndex(average="macro", **options)
    accuracy = MulticlassAccuracy(average="none", **options)
    overall = MulticlassAccuracy(average="micro", **options)
    metrics = (matrix, iou, mean, accuracy, overall)
    for index in range(6):
        image, labels = read_pair(source, index)
        called = segment_image(model.eval(), image, SlideConfig(), HALF, "fp32")
        truth = torch.where(labels == IGNORE, ignored, labels.long())
        for metric in metrics:
            metric.update(called[None], truth[None])
    assert found.confusion.dtype == torch.int64
    assert found.confusion.equal(matrix.compute())
    assert len(found.confusion.unique()) > 5  # else nothing is told apart
    torch.testing.assert_close(found.iou.float(), iou.compute())
    torch.testing.assert_close(found.acc.float(), accuracy.compute())
    assert found.miou == pytest.approx(mean.compute().item(), rel=1e-6)
    assert found.macc == pytest.approx(accuracy.compute().mean().item(), rel=1e-6)
    assert found.aacc == pytest.approx(overall.compute().item(), rel=1e-6)
    assert (found.num_images, found.images_per_second > 0) == (6, True)


def test_measures_by_hand():
    """Class 2 is in the masks and never called, 3 is called and in no mask, 4 is nowhere."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, IGNORE, IGNORE], dtype=torch.int16)
    called = torch.tensor([0, 0, 0, 1, 1, 3, 0, 4, 0])
    confusion = confusion_of(labels.view(3, 3), called.view(3, 3), 5)
    assert confusion.tolist() == [
        [3, 1, 0, 0, 0],
        [0, 1, 0, 1, 0],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    found = Segmentation(confusion, 1, 1.0)
    assert found.iou[:4].tolist() == [3 / 5, 1 / 3, 0, 0]
    assert found.acc[:3].tolist() == [3 / 4, 1 / 2, 0]
    assert found.iou[4:].isnan().all()
    assert found.acc[3:].isnan().all()
    assert found.miou == pytest.approx((3 / 5 + 1 / 3) / 4)
    assert found.macc == pytest.approx((3 / 4 + 1 / 2) / 3)
    assert found.aacc == 4 / 7


def test_masks_that_are_ignored_altogether_count_nothing():
    nothing = torch.full((3, 3), IGNORE)
    found = Segmentation(confusion_of(nothing, torch.zeros(3, 3, dtype=torch.int64), 2), 1, 1.0)
    assert found.confusion.sum() == 0
    assert all(value != value for value in (found.miou, found.macc, found.aacc))


def test_a_mean_over_images_would_be_another_number():
    model, source = PatchModel(), Pairs(2)
    whole = evaluate(model, source).miou
    parts = []
    for files in source.files:
        one = Pairs(1)
        one.files = [files]
        parts.append(evaluate(model, one).miou)
    assert whole != pytest.approx(sum(parts) / 2, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_what_the_cpu_counts():
    """But for pixels of which two classes are as likely, within rounding."""
    world = World(0, 1, torch.device("cuda"))
    there = evaluate(PatchModel().to("cuda"), Pairs(6), world=world)
    here = evaluate(PatchModel(), Pairs(6))
    assert (there.confusion - here.confusion).abs().sum() < here.confusion.sum() / 1000


def test_two_ranks_count_what_one_counts_also_where_one_has_no_image(tmp_path):
    script = Path(__file__).with_name("evaluate_ranks.py")
    subprocess.run(
        [*TWO_RANKS, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(script.parents[2] / "support")},
        check=True,
        timeout=120,
        capture_output=True,
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, count in (("seven", 7), ("one", 1)):
        alone = evaluate(PatchModel(), Pairs(count))
        for result in (first[name], second[name]):
            assert result["confusion"].equal(alone.confusion)
            assert result["num_images"] == count
    assert first["read"]["seven"] + second["read"]["seven"] == list(range(7))
    assert sorted([first["read"]["one"], second["read"]["one"]]) == [[], [0]]
    for error in (first["error"], second["error"]):  # of rank 1's mask, met by both
        assert "cannot use images/6.png (its mask" in error


@pytest.mark.parametrize("part", ["image", "mask", "size"])
def test_a_pair_that_cannot_be_used_is_named_and_the_mode_restored(part):
    source, model = Pairs(3), PatchModel().train()
    if part == "size":
        source.spoil(1, mask=source.files[2].mask)
        message = r"cannot use images/1\.png \(the mask has 31x23 pixels and the image 24x18"
    else:
        source.spoil(1, **{part: encoded(torch.zeros(9, 9).byte().numpy())[:40]})
        message = r"cannot use images/1\.png .*repair or remove it"
    with pytest.raises(ValueError, match=message):
        evaluate(model, source)
    assert model.training


def test_classes_of_another_number_and_no_images_are_refused():
    with pytest.raises(ValueError, match=r"5 classes apart, the masks have 4: .*segment RECIPE"):
        evaluate(PatchModel(), Pairs(1, num_classes=4))
    with pytest.raises(ValueError, match="no images"):
        evaluate(PatchModel(), Pairs(0))


def test_a_signal_ends_an_evaluation_between_images():
    class Signalled(Pairs):
        def labels(self, mask):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().labels(mask)

    with stop_signals(), pytest.raises(Interrupted, match="SIGTERM while evaluating"):
        evaluate(PatchModel(), Signalled(9), num_threads=1)


def test_readers_are_ahead_but_not_by_all():
    begun = []
    values = read_ahead(lambda i: begun.append(i) or i, range(100), num_threads=2)
    assert next(values) == 0
    assert len(begun) <= 5
    assert list(values) == list(range(1, 100))


def test_an_error_of_a_reader_comes_in_its_turn():
    def read(index):
        if index == 2:
            raise ValueError("two")
        return index

    values = read_ahead(read, range(5), num_threads=2)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(values)
