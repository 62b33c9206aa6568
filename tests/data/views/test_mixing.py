"""Erasing, mixup and CutMix do what timm's do for the same draws."""

import random

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from beit_fast.data.views.mixing import draw_erase, draw_mix, erase_boxes, mix, mixed_loss


class Fixed:
    """A generator that draws what it is told."""

    def __init__(self, lam, cuts=False, centre=(0, 0)):
        self.lam, self.cuts, self.centre = lam, cuts, list(centre)

    def random(self):
        return 0.0 if self.cuts else 1.0

    def betavariate(self, alpha, beta):
        return self.lam

    def randrange(self, stop):
        return self.centre.pop(0)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_erased_boxes_are_timms_for_the_same_seed(size):
    timm_erase = RandomErasing(probability=0.5, mode="const", device="cpu")
    erased = 0
    for seed in range(200):
        random.seed(seed)
        expected = timm_erase(torch.ones(3, *size))
        top, left, height, width = draw_erase(*size, 0.5, random.Random(seed))
        ours = torch.ones(3, *size)
        ours[:, top : top + height, left : left + width] = 0
        assert torch.equal(ours, expected), seed
        erased += height > 0
    assert erased == pytest.approx(100, abs=25)


def test_noise_fills_the_boxes_and_nothing_else():
    images = torch.full((3, 3, 60, 60), 7.0)
    boxes = torch.tensor([[0, 0, 0, 0], [10, 20, 30, 40], [0, 0, 59, 59]], dtype=torch.int32)
    erased = erase_boxes(images, boxes)
    assert torch.equal(erased[0], images[0])
    noise = erased[1, :, 10:40, 20:60]
    assert (erased[1] == 7).sum() == images[1].numel() - noise.numel()
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert noise.unique().numel() == noise.numel()


@pytest.mark.parametrize(
    ("lam", "cuts", "centre"),
    [(0.3, False, ()), (0.9, False, ()), (0.4, True, (10, 3)), (0.75, True, (23, 30))],
)
def test_images_and_loss_are_timms_for_the_same_draws(lam, cuts, centre, monkeypatch):
    images, labels = torch.randn(4, 3, 24, 32), torch.tensor([0, 2, 1, 2])
    logits = torch.randn(4, 5)
    timm_mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    monkeypatch.setattr(timm_mix, "_params_per_batch", lambda: (lam, cuts))
    draws = list(centre)
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: draws.pop(0))
    expected, targets = timm_mix(images.clone(), labels)

    weights, box = map(torch.from_numpy, draw_mix(24, 32, 0.8, 1.0, Fixed(lam, cuts, centre)))
    torch.testing.assert_close(mix(images, weights, box), expected)
    assert not torch.equal(expected, images)
    loss = mixed_loss(logits, labels, 0.1, weights)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, targets))


def test_the_loss_without_mixing_is_timms_label_smoothing():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    expected = LabelSmoothingCrossEntropy(0.1)(logits, labels)
    torch.testing.assert_close(mixed_loss(logits, labels, 0.1), expected)
    targets = mixup_target(labels, 5, smoothing=0.1)
    torch.testing.assert_close(SoftTargetCrossEntropy()(logits, targets), expected)


def test_the_middle_of_an_odd_batch_is_its_own_partner():
    images = torch.randn(5, 3, 8, 8)
    mixed = mix(images, torch.tensor([0.3, 0.3]), torch.zeros(4, dtype=torch.int32))
    torch.testing.assert_close(mixed[2], images[2])
    torch.testing.assert_close(mixed[0], 0.3 * images[0] + 0.7 * images[4])


def test_either_mix_happens_half_the_time_and_only_what_is_on():
    def share_of_cuts(mixup, cutmix):
        rng = random.Random(0)
        drawn = [draw_mix(16, 16, mixup, cutmix, rng) for _ in range(2000)]
        for (lam, outside), box in drawn:
            if outside == 1.0:  # a cut
                assert lam == pytest.approx(1 - box[2] * box[3] / 256)
                assert (box[:2] >= 0).all()
                assert (box[:2] + box[2:] <= 16).all()
            else:
                assert lam == outside
                assert not box.any()
        return np.mean([weights[1] == 1.0 for weights, _ in drawn])

    assert share_of_cuts(0.8, 1.0) == pytest.approx(0.5, abs=0.05)
    assert share_of_cuts(0.8, 0.0) < 0.01
    assert share_of_cuts(0.0, 1.0) == 1.0
