"""Drop path whose draws come from outside: the same as if the blocks had drawn them."""

from dataclasses import replace

import pytest
import torch

from beit_fast.model.beit import Beit
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.layers import Block
from beit_fast.model.segmenter import BeitForSemanticSegmentation
from tiny_segmenter import TINY_SEGMENTER

B, L = 6, 16


def drawn_by(model, monkeypatch, run):
    """What `run` gives, and what its blocks drew: fp32 (2 depth, B), 1 where none is dropped."""
    draw, drawn = Block.draw_keep, []
    with monkeypatch.context() as patch:

        def note(self, x):
            drawn.append(draw(self, x))
            return drawn[-1]

        patch.setattr(Block, "draw_keep", note)
        torch.manual_seed(3)
        out = run()
    assert len(drawn) == 2 * len(model.blocks)
    return out, torch.stack([torch.ones(B) if keep is None else keep for keep in drawn])


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["plain", "checkpointed", "selective", "hooked", "unread rows"])
def test_given_draws_train_as_if_the_blocks_had_drawn_them(tiny, randomize, monkeypatch, way):
    skips = way == "unread rows"
    config = tiny(depth=3, drop_path_rate=0.5, vocab_size=8, skip_unread_rows=skips)
    model = randomize(BeitForMaskedImageModeling(config)).train()
    if way in ("checkpointed", "selective"):
        model.set_grad_checkpointing(True if way == "checkpointed" else way)
    if way == "hooked":
        model.blocks[1].register_forward_hook(lambda *_: None)
    images, mask = torch.randn(B, 3, *config.image_pixels), torch.rand(B, L) < 0.4
    index = mask.flatten().nonzero().flatten().int()
    batch = (images, mask, index, torch.randint(8, (B, L)))

    (loss, _), keep = drawn_by(model, monkeypatch, lambda: model.loss(*batch))
    expected = gradients_of(model, loss)
    state = torch.get_rng_state()
    given, _ = model.loss(*batch, keep=keep)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
    torch.testing.assert_close(given, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients_of(model, given).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    other, _ = model.loss(*batch, keep=keep.roll(1, dims=1))
    assert abs(other - loss) > 1e-4 * loss


def test_every_head_takes_them(tiny, monkeypatch):
    classifier = BeitForImageClassification(tiny(depth=3, drop_path_rate=0.5, num_classes=4))
    pixels = BeitForMaskedImageModeling(tiny(depth=3, drop_path_rate=0.5, predict="pixels"))
    segmenter = BeitForSemanticSegmentation(
        replace(TINY_SEGMENTER, img_size=32, patch_size=8, drop_path_rate=0.5, drop_rate=0.0)
    )
    images, mask = torch.randn(B, 3, 32, 32), torch.rand(B, L) < 0.5
    hidden = mask.flatten().nonzero().flatten().int()
    labels = torch.randint(2, (B, 32, 32))
    for model, run in (
        (classifier, lambda **keep: classifier(images, **keep)),
        (pixels, lambda **keep: pixels.pixel_loss(images, mask, hidden, **keep)),
        (segmenter, lambda **keep: segmenter.loss(images, labels, **keep)[0]),
    ):
        out, keep = drawn_by(model.train(), monkeypatch, run)
        torch.testing.assert_close(run(keep=keep), out)


def test_they_count_in_training_alone(tiny):
    model = Beit(tiny(drop_path_rate=0.5)).eval()
    images, keep = torch.randn(B, 3, 32, 32), torch.zeros(2 * len(model.blocks), B)
    assert torch.equal(model(images, keep=keep), model(images))
    model.train()
    assert not torch.equal(model(images, keep=keep), model.eval()(images))


def test_they_compile_in_one_graph(tiny, randomize):
    config = tiny(depth=2, drop_path_rate=0.5)
    model = randomize(Beit(config)).train()
    images = torch.randn(B, 3, *config.image_pixels)
    keep = torch.tensor([0.0, 2.0, 2.0, 0.0, 0.0, 2.0]).expand(4, B)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, keep=keep), model(images, keep=keep))


@pytest.mark.parametrize(
    ("changes", "keep", "message"),
    [
        ({}, torch.ones(2, B), r"torch\.float32 \(2, 6\): pass float32 \(4, 6\), two rows a block"),
        ({}, torch.ones(4, B, dtype=torch.float64), r"float64 \(4, 6\): pass float32 \(4, 6\)"),
        ({"drop_path_compact": True}, torch.ones(4, B), "pass no keep, or build the model without"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, changes, keep, message):
    config = tiny(depth=2, drop_path_rate=0.5, **changes)
    with pytest.raises(ValueError, match=message):
        Beit(config)(torch.randn(B, 3, *config.image_pixels), keep=keep)
