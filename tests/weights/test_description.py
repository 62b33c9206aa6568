"""Files that were moved, renamed or written by others: what is known of them, and what is not."""

import dataclasses
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForImageClassification
from beit_fast.train import state as train_state
from beit_fast.train.state import load_checkpoint, metadata_of, save_checkpoint
from beit_fast.weights import description
from beit_fast.weights.convert import convert
from beit_fast.weights.description import Description, description_of
from beit_fast.weights.files import write_weights
from beit_fast.weights.read import read_checkpoint
from beit_fast.weights.save import save_pretrained
from tiny_models import PER_BLOCK, VANILLA

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
        "crop_pct": 0.95,
    }
    tensors = {"model": model.state_dict(), "ema": model.state_dict()}
    metadata = metadata_of(settings)
    return save_checkpoint(tmp_path / "run", 7, tensors, settings, keep=1, metadata=metadata)


def assert_understood(path, step):
    weights = read_checkpoint(path)
    assert weights.config == read_checkpoint(step / "ema.safetensors").config
    assert (weights.config.num_heads, weights.config.image_pixels) == (4, (24, 64))
    assert weights.labels == tuple(CLASSES)
    assert (weights.statistics, weights.crop_pct) == ("imagenet", 0.95)
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
    assert tuple(train_state.DESCRIBED) == (*keys, description.CROP_KEY)
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


@pytest.mark.parametrize("crop", ["all", 0, 1.5, float("nan")])
def test_a_crop_that_is_no_share_is_refused_with_the_file(crop, tiny, tmp_path):
    state = BeitForImageClassification(tiny(**PER_BLOCK)).state_dict()
    write_weights(tmp_path / "w.safetensors", state, metadata=metadata_of({"crop_pct": crop}))
    with pytest.raises(ValueError, match=r"w.safetensors: the crop is .*up to 1 is needed"):
        read_checkpoint(tmp_path / "w.safetensors")


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


# --- values that are no numbers -------------------------------------------------------------------
