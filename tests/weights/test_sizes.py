"""Sizes that no file says: grids and heads are what fits, asked for, or guessed aloud."""

import logging

import pytest
import torch

from beit_fast.model.beit import Beit
from beit_fast.model.config import beit_config
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table
from beit_fast.weights.convert import convert
from beit_fast.weights.load import from_pretrained, load_pretrained
from beit_fast.weights.read import read_checkpoint
from beit_fast.weights.sizes import grid_of, num_heads_of
from tiny_models import PER_BLOCK, VANILLA


@pytest.mark.parametrize("kind", [Beit, BeitForMaskedImageModeling, BeitForImageClassification])
@pytest.mark.parametrize("positions", [VANILLA, PER_BLOCK, {}], ids=["vanilla", "own", "shared"])
def test_a_unilm_file_that_is_not_square_is_read_where_its_size_is_given(
    kind, positions, tiny, randomize, tmp_path
):
    model = randomize(kind(tiny(**positions, img_size=(24, 40), num_classes=0))).eval()
    path = tmp_path / "unilm.pth"
    torch.save({"model": model.state_dict()}, path)
    given = {"img_size": (24, 40), **({"num_heads": 4} if positions is VANILLA else {})}
    loaded = [from_pretrained(path, kind, **given), kind(model.config), kind(model.config)]
    load_pretrained(loaded[1], path)
    for name, to in (("w.safetensors", "unilm"), ("w.pth", "unilm"), ("hf", "hf")):
        convert(path, tmp_path / name, to=to, **given)
        loaded.append(from_pretrained(tmp_path / name, kind))
    load_pretrained(loaded[2], tmp_path / "w.pth")
    for other in loaded:
        assert other.config.image_pixels == (24, 40)
        for name, tensor in model.state_dict().items():
            assert other.state_dict()[name].equal(tensor), name
    # The file that says its size is resized to another one.
    larger = from_pretrained(tmp_path / "w.safetensors", kind, img_size=48)
    if positions is VANILLA:
        assert larger.pos_embed.equal(resize_pos_embed(model.pos_embed, (3, 5), (6, 6)))
    else:
        name = next(n for n in model.state_dict() if n.endswith("bias_table"))
        wanted = resize_rel_pos_table(model.state_dict()[name], (3, 5), (6, 6))
        assert larger.state_dict()[name].equal(wanted)
    for call in (
        lambda: from_pretrained(path, kind, num_heads=4),
        lambda: from_pretrained(path, kind, num_heads=4, img_size=48),
        lambda: convert(path, tmp_path / "x.pth", to="unilm", num_heads=4),
    ):
        with pytest.raises(ValueError, match=r"no square grid: pass img_size.*24x40"):
            call()
    with pytest.raises(ValueError, match=r"img_size 48 was given, the source has \(24, 40\)"):
        convert(tmp_path / "w.safetensors", tmp_path / "x.pth", to="unilm", img_size=48)


def test_heads_that_nothing_shows_are_asked_for_and_not_guessed(tiny, randomize, tmp_path, caplog):
    model = randomize(Beit(tiny(**VANILLA, embed_dim=128, num_heads=8))).eval()
    path = tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    for call in (from_pretrained, read_checkpoint, lambda p: convert(p, "x.pth", to="timm")):
        with pytest.raises(ValueError, match=r"w\.pth: how many heads .*pass num_heads"):
            call(path)
    images = torch.randn(1, 3, 32, 32)
    with caplog.at_level(logging.WARNING, logger="beit_fast.model"):
        torch.testing.assert_close(from_pretrained(path, num_heads=8)(images), model(images))
    assert "num_heads 8 was asked for: the source does not show it" in caplog.text
    other = Beit(model.config)
    assert load_pretrained(other, path).notes == (
        "num_heads 8 was asked for: the source does not show it",
    )
    report = convert(path, tmp_path / "c.safetensors", to="timm", num_heads=8)
    assert "num_heads 8 was asked for" in str(report)
    assert from_pretrained(tmp_path / "c.safetensors").config.num_heads == 8
    with pytest.raises(ValueError, match="8 heads in the source, 4 here"):
        from_pretrained(tmp_path / "c.safetensors", num_heads=4)
    with pytest.raises(ValueError, match="and 5 heads do not divide them"):
        from_pretrained(path, num_heads=5)


@pytest.mark.parametrize(("size", "heads"), [("base", 12), ("large", 16)])
def test_the_heads_of_the_published_sizes_are_known(size, heads):
    config = beit_config(f"beit_{size}_patch16_224_vanilla")
    known = config.embed_dim, config.depth
    assert num_heads_of(None, config.embed_dim, known) == (heads, None)
    assert num_heads_of(None, config.embed_dim, known, heads) == (heads, None)
    assert num_heads_of(None, config.embed_dim, known, 4)[1].startswith("num_heads 4 was asked")
    with pytest.raises(ValueError, match="pass num_heads"):
        num_heads_of(None, 384, (384, 12))


@pytest.mark.parametrize(
    ("rows", "wanted", "grid", "guess"),
    [
        (732, None, (14, 14), None),
        (3972, None, (32, 32), "25x41, 41x25 would have as many"),
        (228, None, (8, 8), "grid 8x8; 5x13, 13x5 would have as many"),
        (228, (80, 208), (5, 13), "grid 5x13 that was asked for; 8x8 would have as many"),
        (228, 128, (8, 8), None),
        (228, 384, (8, 8), "would have as many"),
        (48, (48, 80), (3, 5), None),
        (48, 81, None, None),  # patches do not divide what was asked for
    ],
)
def test_a_grid_is_what_fits_and_what_else_would_is_said(rows, wanted, grid, guess):
    def read():
        return grid_of(torch.zeros(rows, 2), None, (16, 16), (32, 2), wanted)

    if grid is None:
        with pytest.raises(ValueError, match=r"a table of 48 rows is of no square grid.*48x80"):
            read()
        return
    assert read()[0] == grid
    assert (guess or "") in (read()[1] or "")
    assert (read()[1] is None) == (guess is None)
    # The published Large at 512 px has the grid 32x32: no guess.
    assert grid_of(torch.zeros(3972, 16), None, (16, 16), (1024, 24)) == ((32, 32), None)
