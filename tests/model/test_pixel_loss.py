"""The loss of pixels against torch's cross-entropy of enlarged scores."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.labels import IGNORE
from beit_fast.model import pixel_loss
from beit_fast.model.pixel_loss import pixel_cross_entropy


def inputs(size=(23, 40), num_images=3, dtype=torch.float64):
    torch.manual_seed(0)
    scores = 3 * torch.randn(num_images, 7, 6, 10, dtype=dtype)
    labels = torch.randint(-1, 7, (num_images, *size))
    return scores.requires_grad_(), labels


def reference(scores, labels):
    large = F.interpolate(scores, size=labels.shape[1:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(large, labels, ignore_index=IGNORE, reduction="none")
    kept = labels != IGNORE
    return losses.mean(), (large.argmax(dim=1) == labels)[kept].double().mean()


@pytest.mark.parametrize("chunk", [1, 2 * 7 * 23 * 40, 2**25], ids=["1", "2", "all"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_loss_share_and_gradient_are_those_of_torch(monkeypatch, chunk, channels_last):
    monkeypatch.setattr(pixel_loss, "CHUNK", chunk)
    scores, labels = inputs()
    if channels_last:
        scores = scores.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    loss, share = pixel_cross_entropy(scores, labels.short())
    expected, right = reference(scores, labels)
    torch.testing.assert_close(loss, expected)
    assert share.item() == pytest.approx(right.item())
    (found,) = torch.autograd.grad(3 * loss, scores)
    (wanted,) = torch.autograd.grad(3 * expected, scores)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(pixel_cross_entropy(scores, labels)[0], expected)


def test_smaller_labels_and_none_that_counts():
    scores, labels = inputs(size=(3, 5))
    torch.testing.assert_close(pixel_cross_entropy(scores, labels)[0], reference(scores, labels)[0])
    loss, share = pixel_cross_entropy(scores, torch.full_like(labels, IGNORE))
    assert (loss.item(), share.item()) == (0, 0)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_bits_are_counted_in_fp32(dtype):
    scores, labels = inputs(dtype=dtype)
    loss, _ = pixel_cross_entropy(scores, labels)
    exact = scores.detach().double().requires_grad_()
    expected, _ = reference(exact, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (1024 * loss).backward()  # as a scaler does for fp16
    (wanted,) = torch.autograd.grad(1024 * expected, exact)
    assert scores.grad.dtype == dtype
    torch.testing.assert_close(scores.grad.double(), wanted, rtol=1e-2, atol=1e-4)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.found = max(self.found, out.numel())
        return out


def test_no_more_than_a_chunk_is_ever_of_full_size(monkeypatch):
    monkeypatch.setattr(pixel_loss, "CHUNK", 2 * 7 * 64 * 64)
    scores, labels = inputs(size=(64, 64), num_images=5, dtype=torch.float32)
    with Largest() as seen:  # it sees no more of an operator than what comes out
        pixel_loss._pixel_cross_entropy(scores.detach(), labels, True)
    assert seen.found == 2 * 7 * 64 * 64


@pytest.mark.parametrize("kind", [torch.int64, torch.int16, torch.uint8])
@pytest.mark.parametrize("wrong", [-100, -2, 7, 255])  # torch's and mmsegmentation's own, too
def test_values_that_are_no_class_are_refused_and_the_remedy_works(wrong, kind):
    scores, labels = inputs()
    labels = labels.clamp(min=0)
    labels[0, 1, 2] = wrong
    labels = labels.to(kind)
    stored = int(labels[0, 1, 2])  # of 8 bits without a sign: another
    with pytest.raises(ValueError, match=f"the value {stored} and the classes are 0 to 6: .*long"):
        pixel_cross_entropy(scores, labels)
    mended = labels.long().masked_fill(labels == stored, IGNORE)
    torch.testing.assert_close(pixel_cross_entropy(scores, mended)[0], reference(scores, mended)[0])


def test_the_reference_is_the_same():
    scores, labels = inputs()
    for one, other in zip(
        pixel_cross_entropy(scores, labels),
        pixel_cross_entropy(scores, labels, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
