"""Files and folders of weights: what is read, and the one line for each that is not."""

import argparse
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from beit_fast.train.state import save_checkpoint
from beit_fast.weights.files import read_weights, write_weights
from damaged import damages, not_refused

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def assert_read(found):
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("root", [None, "model", "module", "state_dict"])
def test_torch_files_are_read_from_their_root(root, tmp_path):
    content = TENSORS if root is None else {root: TENSORS, "epoch": 3, "optimizer": {"x": 1}}
    torch.save(content, tmp_path / "w.pth")
    assert_read(read_weights(tmp_path / "w.pth").tensors)


def test_unilm_keeps_its_command_line_beside_the_weights_and_an_average(tmp_path):
    args = argparse.Namespace(lr=1e-3)
    average = {"a": TENSORS["a"] + 1}
    torch.save({"model": TENSORS, "model_ema": average, "args": args}, tmp_path / "w.pth")
    assert_read(read_weights(tmp_path / "w.pth").tensors)
    found = read_weights(tmp_path / "w.pth", key="model_ema").tensors
    assert torch.equal(found["a"], average["a"])


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_what_is_written_is_read(name, tmp_path):
    write_weights(tmp_path / name, TENSORS)
    assert_read(read_weights(tmp_path / name).tensors)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_weights(tmp_path / "w.pth", TENSORS)
    with pytest.raises(Exception, match="pickle"):
        write_weights(tmp_path / "w.pth", {"a": lambda: None})
    assert_read(read_weights(tmp_path / "w.pth").tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


def shards(folder):
    homes = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for home in ("model-1.safetensors", "model-2.safetensors"):
        save_file({n: t for n, t in TENSORS.items() if homes.get(n) == home}, folder / home)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": homes}))
    return index


def test_shards_are_read_by_folder_and_by_index(tmp_path):
    index = shards(tmp_path)
    assert_read(read_weights(index).tensors)
    assert_read(read_weights(tmp_path).tensors)


@pytest.mark.promise("S7")
def test_a_shard_that_is_missing_outside_or_other_is_named(tmp_path):
    index = shards(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "c": "../x"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"z": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"disagree on \['a', 'z'\]"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(ValueError, match="no weight_map"):
        read_weights(index)
    (shards(tmp_path).parent / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors is missing"):
        read_weights(index)


class Planted:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.promise("S1")
@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_of_a_pickle_runs(legacy, tmp_path):
    marker = tmp_path / "ran"
    content = {"model": TENSORS, "args": Planted(marker)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"w.pth needs code .*system.*nothing of it was run"):
        read_weights(tmp_path / "w.pth")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("length", [0, 10, 100, -1])
def test_a_cut_file_is_named(name, length, tmp_path):
    path = tmp_path / name
    write_weights(path, TENSORS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=name):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ([1, 2], None, "holds a list"),
        ({"model": TENSORS}, "ema", "has no 'ema': pass one of model"),
        ({"model": TENSORS, "n": 3}, "n", "'n' is a int"),
        ({"a": torch.ones(1), "n": 3}, None, "no dense tensors: n"),
    ],
)
def test_other_contents_are_refused(content, key, message, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "w.pth", key=key)


@pytest.mark.promise("S3")
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of a pickle protocol it guesses
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_garbled_bytes_give_tensors_or_a_value_error(kind, tmp_path):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    write_weights(path, TENSORS)
    if kind == "legacy":
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    content, generator, refused = path.read_bytes(), random.Random(0), []
    for _ in range(150):
        garbled = bytearray(content)
        for _ in range(3):
            garbled[generator.randrange(min(len(content), 600))] = generator.randrange(256)
        path.write_bytes(garbled)
        try:
            read_weights(path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert all(path.name in message for message in refused)


def test_a_place_without_weights_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"holds none of model\.safetensors.* no checkpoint of a run"
    ):
        read_weights(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="one set of weights"):
        read_weights(tmp_path, key="ema")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, not an object"):
        read_weights(tmp_path)


@pytest.mark.promise("R5")
def test_a_damaged_file_of_a_step_is_refused_with_its_manifest_and_without(tmp_path):
    settings = {"model": {"depth": 2}}
    step = save_checkpoint(tmp_path, 1, {"model": TENSORS}, settings, keep=1)
    moved = Path(shutil.copy(step / "model.safetensors", tmp_path / "moved.safetensors"))
    for path in (step / "model.safetensors", moved):
        assert not_refused(path, damages(path, flips=100, zeroed=20), read_weights) == []
        assert_read(read_weights(path).tensors)
    manifest = step / "manifest.json"
    read = [lambda _: read_weights(step), lambda _: read_weights(step / "model.safetensors")]
    for load in read:
        assert not_refused(manifest, damages(manifest, flips=60, zeroed=10), load) == []


@pytest.mark.promise("R5")
def test_a_damaged_shard_of_ours_is_refused_by_name(tmp_path):
    index = shards(tmp_path)
    for home in ("model-1.safetensors", "model-2.safetensors"):
        tensors = read_weights(tmp_path / home).tensors
        write_weights(tmp_path / home, tensors)
        path = tmp_path / home
        flips = damages(path, flips=40, zeroed=10)
        assert not_refused(path, flips, lambda _: read_weights(index)) == []
    assert_read(read_weights(tmp_path).tensors)


def test_a_step_of_a_run_is_read_against_its_digest(tmp_path):
    old = {n: t + 1 for n, t in TENSORS.items()}
    settings = {"model": {"depth": 2}}
    save_checkpoint(tmp_path, 1, {"model": old}, settings, keep=3)
    step = save_checkpoint(tmp_path, 2, {"model": TENSORS, "ema": old}, settings, keep=3)
    for path in (tmp_path, step):
        found = read_weights(path)
        assert_read(found.tensors)
        assert found.said.config == {"depth": 2}
    assert torch.equal(read_weights(tmp_path, key="ema").tensors["a"], old["a"])
    with pytest.raises(ValueError, match=r"no swa\.safetensors: pass another key"):
        read_weights(step, key="swa")
    content = bytearray((step / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (step / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its SHA-256"):
        read_weights(step)
    (step / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        read_weights(step)
    (step / "manifest.json").write_text('{"made by": "others"}')
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: .* it is of no checkpoint"):
        read_weights(step)
