"""Files that were moved, renamed or written by others: what is known of them, and what is not."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table
from beit_fast.train import state as train_state
from beit_fast.train.state import load_checkpoint, metadata_of, save_checkpoint
from beit_fast.weights import description
from beit_fast.weights.description import Description, description_of
from beit_fast.weights.files import read_weights, write_weights
from beit_fast.weights.pretrained import convert, from_pretrained, load_pretrained, save_pretrained
from beit_fast.weights.read import read_checkpoint
from beit_fast.weights.sizes import grid_of, num_heads_of

VANILLA = {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False, "init_values": None}
PER_BLOCK = {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}
CLASSES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture
def step(tiny, randomize, tmp_path):
    """A step of a run whose heads and grid no shape tells, as the loop writes it."""
    config = tiny(**VANILLA, img_size=(24, 64))
    model = randomize(BeitForImageClassification(config))
    settings = {
        "model": json.loads(json.dumps(dataclasses.asdict(config))),
        "statistics": "imagenet",
        "classes": CLASSES,
    }
    tensors = {"model": model.state_dict(), "ema": model.state_dict()}
    metadata = metadata_of(settings)
    return save_checkpoint(tmp_path / "run", 7, tensors, settings, keep=1, metadata=metadata)


def assert_understood(path, step):
    weights = read_checkpoint(path)
    assert weights.config == read_checkpoint(step / "ema.safetensors").config
    assert (weights.config.num_heads, weights.config.image_pixels) == (4, (24, 64))
    assert weights.labels == tuple(CLASSES)
    assert weights.statistics == "imagenet"
    assert weights.guesses == ()
    return weights


def test_a_runs_file_is_read_with_the_manifest_beside_it_and_with_none(step, tmp_path):
    for name in ("model.safetensors", "ema.safetensors"):
        assert_understood(step / name, step)
    moved = shutil.copy(step / "model.safetensors", tmp_path / "elsewhere.safetensors")
    assert_understood(moved, step)
    # Written by a version that put nothing into its files: the manifest alone says it.
    manifest = json.loads((step / "manifest.json").read_text())
    old = step.parent / "step_00000008"
    save_checkpoint(
        step.parent.parent, 8, {"model": load_file(moved)}, manifest["settings"], keep=2
    )
    lone = shutil.copy(old / "model.safetensors", tmp_path / "lone.safetensors")
    assert description_of(lone) == Description()
    assert_understood(old / "model.safetensors", step)


def test_a_file_that_is_not_the_manifests_is_said_and_another_manifest_is_no_concern(
    step, tmp_path
):
    path = step / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="its SHA-256 is not the one it was saved with"):
        read_checkpoint(path)
    for content in ('{"name": "an app"}', "[]", "{", '{"files": {"other": ""}, "settings": {}}'):
        (tmp_path / "manifest.json").write_text(content)
        moved = shutil.copy(step / "ema.safetensors", tmp_path / "moved.safetensors")
        assert_understood(moved, step)


def test_the_loop_writes_the_keys_that_are_read(step):
    keys = (description.CONFIG_KEY, description.CLASSES_KEY, description.STATISTICS_KEY)
    assert tuple(train_state.DESCRIBED) == keys
    assert train_state.MANIFEST == description.MANIFEST
    assert metadata_of({"seed": 3}) == {}
    assert load_checkpoint(step).tensors.keys() == {"model", "ema"}  # whole by its digests


@pytest.mark.parametrize(
    ("to", "name"),
    [("unilm", "u.pth"), ("unilm", "u.safetensors"), ("timm", "t.safetensors"), ("hf", "hf")],
)
def test_what_a_conversion_writes_says_it_too(to, name, step, tmp_path):
    convert(step, tmp_path / name, to=to)
    assert_understood(tmp_path / name, step)
    again = tmp_path / "again.safetensors"
    convert(tmp_path / name, again, to="unilm", statistics=((0.1,) * 3, (0.2,) * 3))
    assert read_checkpoint(again).labels == tuple(CLASSES)
    assert read_checkpoint(again).statistics == ((0.1,) * 3, (0.2,) * 3)


def test_a_saved_model_says_it_and_a_config_json_that_was_edited_counts(tiny, randomize, tmp_path):
    model = randomize(BeitForImageClassification(tiny(**PER_BLOCK, dynamic_img_size=True)))
    save_pretrained(model, tmp_path, labels=CLASSES, statistics="half")
    lone = shutil.copy(tmp_path / "model.safetensors", tmp_path / "lone.safetensors")
    for path in (tmp_path, lone):
        weights = read_checkpoint(path)
        assert weights.config == model.config
        assert (weights.labels, weights.statistics) == (tuple(CLASSES), "half")
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"layer_norm_eps": 1e-5}))
    assert read_checkpoint(tmp_path).config == dataclasses.replace(model.config, norm_eps=1e-5)


@pytest.mark.parametrize("statistics", ["none", (0.5, 0.5), ((0.5,) * 3,)])
def test_statistics_that_no_one_could_read_back_are_refused(statistics, tiny, tmp_path):
    model = BeitForImageClassification(tiny(**PER_BLOCK))
    with pytest.raises(ValueError, match=r"statistics are .*mean and std"):
        save_pretrained(model, tmp_path / "hf", statistics=statistics)
    with pytest.raises(ValueError, match=r"statistics are .*mean and std"):
        convert(model.state_dict(), tmp_path / "w.pth", to="unilm", statistics=statistics)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folded", [False, True])
def test_a_config_that_names_fields_which_are_gone_is_read(folded, tiny, tmp_path):
    model = BeitForImageClassification(tiny(**PER_BLOCK, norm_eps=1e-5))
    said = dataclasses.asdict(model.config) | dict.fromkeys(BeitConfig.REMOVED, folded)
    path = tmp_path / "w.safetensors"
    write_weights(path, model.state_dict(), metadata={"beit_fast.config": json.dumps(said)})
    assert read_checkpoint(path).config == model.config


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("config", "{", "its beit_fast.config cannot be read"),
        ("config", "[1]", "its config is a list"),
        ("config", '{"depths": 3}', r"its config has \['depths'\]"),
        ("statistics", "[1]", r"the statistics are \[1\], and mean and std"),
        ("classes", '["a"]', "1 names of classes, 5 rows"),
    ],
)
def test_metadata_that_is_wrong_is_an_error_that_names_the_file(key, text, message, tiny, tmp_path):
    state = BeitForImageClassification(tiny(**PER_BLOCK)).state_dict()
    path = tmp_path / "w.safetensors"
    write_weights(path, state, metadata={f"beit_fast.{key}": text})
    with pytest.raises(ValueError, match=rf"w\.safetensors: .*{message}"):
        read_checkpoint(path)


# --- what nothing says ----------------------------------------------------------------------------


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


def test_transformers_names_without_their_config_leave_the_epsilon_open(tiny, randomize, tmp_path):
    from transformers import BeitForImageClassification as Theirs

    save_pretrained(randomize(BeitForImageClassification(tiny(**PER_BLOCK))), tmp_path)
    Theirs.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    lone = shutil.copy(tmp_path / "theirs" / "model.safetensors", tmp_path / "lone.safetensors")
    (guess,) = read_checkpoint(lone).guesses
    assert guess.startswith("norm_eps is 1e-06: transformers' files have 1e-12")
    assert read_checkpoint(lone, norm_eps=1e-12).guesses == ()
    assert read_checkpoint(tmp_path / "theirs").guesses == ()


# --- values that are no numbers -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named_and_counted(value, dtype, tiny, tmp_path):
    model = BeitForImageClassification(tiny(**PER_BLOCK)).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in before.items()}
    state["blocks.1.mlp.fc1.weight"].flatten()[:3] = value
    state["head.bias"][2] = value
    path = tmp_path / "diverged.pth"
    torch.save(state, path)
    message = (
        r"diverged\.pth: 4 values of 2 tensors are NaN or infinite: "
        r"blocks\.1\.mlp\.fc1\.weight \(3 of 4096\), head\.bias \(1 of 5\)"
    )
    for call in (
        read_checkpoint,
        from_pretrained,
        lambda path: load_pretrained(model, path),
        lambda path: convert(path, tmp_path / "x.pth", to="timm"),
    ):
        with pytest.raises(ValueError, match=message):
            call(path)
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
    # As the message says, they can be looked at.
    assert (~read_weights(path).tensors["head.bias"].isfinite()).sum() == 1


def test_large_values_are_finite(tiny):
    model = BeitForImageClassification(tiny(**PER_BLOCK)).half()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.fill_(60000)  # their sum is infinite in fp16
    read_checkpoint(model.state_dict())


def test_fp8_in_a_file_is_read_and_its_nan_is_said(tiny):
    model = BeitForImageClassification(tiny())
    state, name = model.state_dict(), "blocks.0.mlp.fc1.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    again = from_pretrained(state)
    assert again.state_dict()[name].equal(state[name].float())
    state[name][0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"NaN or infinite: {name} \(1 of"):
        from_pretrained(state)


def test_a_web_page_in_the_place_of_weights_is_called_one(tmp_path):
    (tmp_path / "w.safetensors").write_text("<!doctype html>")
    with pytest.raises(ValueError, match=r"w.safetensors is a web page and not weights"):
        description_of(tmp_path / "w.safetensors")
