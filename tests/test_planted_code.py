"""Code planted in every kind of file that is read, through every verb that reads it: none runs.

Each file is armed first: what it was made to be, a pickle, an archive of torch's, YAML, a module,
is read here as a careless reader would, and its marker comes. Only then is it given to the command.
"""

import hashlib
import importlib.util
import json
import os
import pickle
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from beit_fast.cli import main
from beit_fast.data.token_cache import MANIFEST, Manifest, record_dtype, write_manifest
from beit_fast.tasks.probe.features import _open as open_features
from beit_fast.tokenizer.checkpoint import load_tokenizer, save_tokenizer
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.train.log import Log
from beit_fast.train.state import CheckpointError, load_checkpoint, save_checkpoint
from beit_fast.weights.files import read_weights
from refusals import refusal, write_good
from tiny_classifier import TINY_CLASSIFIER

pytestmark = pytest.mark.promise("S1", "S6")


class Planted:
    """Unpickles to a folder that is there from then on."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def of_torch(path, marker):
    torch.save({"model": {"a": torch.zeros(2)}, "args": Planted(marker)}, path)


def of_torch_before_zip(path, marker):
    content = {"model": {"a": Planted(marker)}}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def whole_object(path, marker):
    torch.save(Planted(marker), path)


def whole_module(path, marker):
    module = nn.Linear(1, 2)
    module.extra = Planted(marker)
    torch.save(module, path)


def plain_pickle(path, marker):
    path.write_bytes(pickle.dumps({"model": Planted(marker)}))


def old_pickle(path, marker):
    path.write_bytes(pickle.dumps(Planted(marker), protocol=0))


def array(path, marker):
    with path.open("wb") as file:
        np.save(file, np.array([Planted(marker)] * 6, dtype=object), allow_pickle=True)


def arrays(path, marker):
    with path.open("wb") as file:
        np.savez(file, model=np.array([Planted(marker)], dtype=object))


def yaml_object(path, marker):
    path.write_text(f'optim: !!python/object/apply:os.mkdir ["{marker}"]\n')


def module_of_python(path, marker):
    path.write_text(f"import os\nos.mkdir({str(marker)!r})\n")


def import_module(path):
    spec = importlib.util.spec_from_file_location("planted", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def load_torch(path):
    torch.load(path, weights_only=False)


def load_pickle(path):
    pickle.loads(path.read_bytes())


def load_array(path):
    with path.open("rb") as file:
        found = np.load(file, allow_pickle=True)
        list(found.values() if isinstance(found, np.lib.npyio.NpzFile) else found)


CARELESSLY = {
    of_torch: load_torch,
    of_torch_before_zip: load_torch,
    whole_object: load_torch,
    plain_pickle: load_pickle,
    old_pickle: load_pickle,
    array: load_array,
    arrays: load_array,
}
PICKLES = tuple(CARELESSLY)
CARELESSLY |= {
    whole_module: load_torch,
    yaml_object: lambda path: yaml.unsafe_load(path.read_text()),
    module_of_python: import_module,
}


@pytest.fixture
def plant(tmp_path):
    """`plant(kind, path)`: the file, armed; what it leaves if it runs is told at the end."""
    markers = []

    def planted(kind, path):
        markers.append(tmp_path / f"ran_{len(markers)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        kind(path, markers[-1])
        CARELESSLY[kind](path)
        markers[-1].rmdir()  # raises unless it ran
        return path

    yield planted
    assert markers
    assert not [marker for marker in markers if marker.exists()]


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """`refused(arguments, name)`: the command ends with one line, which has the name."""
    monkeypatch.chdir(tmp_path)

    def check(arguments, name):
        assert str(name) in refusal(arguments, capsys)

    return check


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_good(tmp_path_factory.mktemp("good"))


def commands_of_weights(path, good, tmp_path):
    """All that take weights."""
    images = good / "images"
    tiny = ["digits", "--run.epochs", "1", "--optim.warmup_epochs", "0"]
    return [
        ["evaluate", path, images, "--device", "cpu"],
        ["predict", path, images, "--device", "cpu"],
        ["convert", path, tmp_path / "out.safetensors", "--to", "timm"],
        ["finetune", *tiny, "--init", path, "--run.device", "cpu"],
        ["probe", "digits", "--checkpoint", path, "--device", "cpu"],
        ["evaluate-segmentation", path, images, "--device", "cpu"],
        ["predict-segmentation", path, images, "--output", tmp_path / "s", "--device", "cpu"],
    ]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pkl", ".npz", ".safetensors"])
def test_weights(suffix, good, plant, refused, tmp_path):
    for number, kind in enumerate(PICKLES):
        path = plant(kind, tmp_path / f"{kind.__name__}{suffix}")
        commands = commands_of_weights(path, good, tmp_path)
        for command in commands if number == 0 else commands[1:3]:  # they read them by one function
            refused(command, path)


def test_a_folder_of_the_hub_and_its_own_code(good, plant, refused, tmp_path):
    """transformers would import what auto_map names, where it is trusted."""
    for number, kind in enumerate((of_torch, of_torch_before_zip, plain_pickle)):
        folder = tmp_path / f"hub_{number}"
        folder.mkdir()
        config = json.loads((good / "hub" / "config.json").read_text())
        code = {"AutoConfig": "planted.C", "AutoModelForImageClassification": "planted.M"}
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": code}))
        plant(module_of_python, folder / "planted.py")
        shutil.copy(good / "hub" / "model.safetensors", folder)
        command = ["predict", folder, good / "images" / "red", "--device", "cpu"]
        assert main([str(argument) for argument in command]) == 0  # without a word of its code
        (folder / "model.safetensors").unlink()
        refused(command, plant(kind, folder / "pytorch_model.bin"))


def test_shards_of_a_folder_of_the_hub(good, plant, refused, tmp_path):
    shutil.copy(good / "hub" / "config.json", tmp_path)
    shard = plant(of_torch, tmp_path / "model-1.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    for path in (index, tmp_path):
        refused(["convert", path, tmp_path / "out.pth", "--to", "timm"], shard)


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"]
)
def test_descriptions_beside_weights(name, good, plant, refused, tmp_path):
    shutil.copytree(good / "hub", tmp_path / "hub")
    path = plant(plain_pickle, tmp_path / "hub" / name)
    if "index" in name:
        (tmp_path / "hub" / "model.safetensors").unlink()
    refused(["predict", tmp_path / "hub", good / "images" / "red", "--device", "cpu"], path)


@pytest.mark.promise("S2")
def test_tokenizers(plant, refused, tmp_path):
    for kind in (*PICKLES, whole_module):
        for suffix in (".pkl", ".safetensors"):
            path = plant(kind, tmp_path / f"{kind.__name__}{suffix}")
            given = ["--tokenizer", path, "--tokenizer_training", "null", "--run.device", "cpu"]
            refused(["pretrain", "demo", *given], path)
            both = ["--encoder", path, "--decoder", path, "--output", tmp_path / "out"]
            refused(["convert-dalle", *both], path)
    given[1] = plant(of_torch, tmp_path / "t.pkl")
    refused(["pretokenize", "demo", *given, "--output", tmp_path / "tokens"], given[1])


def test_a_token_cache(plant, refused, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    made_from = {"data": {"num_images": 6, "names_and_sizes": ""}, "grid": [1, 2]}
    manifest = Manifest(made_from, 1, 6, {}, {})
    (shard,) = manifest.shards()
    np.save(tokens / shard.name, np.zeros(6, record_dtype(2)))
    command = ["pretrain", "demo", "--run.device", "cpu", "--tokenizer", "null"]
    command += ["--tokenizer_training", "null", "--token_cache", tokens]
    for kind in (array, plain_pickle, of_torch):
        path = plant(kind, tokens / shard.name)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        write_manifest(tokens, replace(manifest, files={shard.name: digest}))  # it is what is said
        refused(command, path)
    refused(command, plant(plain_pickle, tokens / MANIFEST))


@pytest.mark.parametrize("stem", ["model", "optimizer", "run", "manifest"])
def test_a_checkpoint_of_a_run(stem, good, plant, refused, tmp_path):
    tensors = {name: {"a": torch.zeros(2)} for name in ("model", "optimizer", "run")}
    settings = {"model": asdict(TINY_CLASSIFIER)}
    step = save_checkpoint(tmp_path / "run", 1, tensors, settings, keep=1)
    load_checkpoint(step)
    for kind in (plain_pickle, of_torch, of_torch_before_zip, array):
        path = plant(kind, step / f"{stem}.{'json' if stem == 'manifest' else 'safetensors'}")
        if stem != "manifest":
            # Of the format without a digest of its own, so that the file is what the manifest says.
            manifest = json.loads((step / "manifest.json").read_text())
            files = manifest["files"] | {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
            manifest = {
                k: v for k, v in manifest.items() if k in ("step", "settings", "environment")
            }
            (step / "manifest.json").write_text(
                json.dumps({"format": 1, "files": files} | manifest)
            )
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_checkpoint(step)
        if stem in ("model", "manifest"):
            for source in (tmp_path / "run", step, step / "model.safetensors"):
                refused(commands_of_weights(source, good, tmp_path)[1], step)


def test_metrics_of_a_run(plant, tmp_path):
    path = plant(old_pickle, tmp_path / "metrics.jsonl")
    Log(tmp_path, title="train", start=1, num_steps=2).close()  # lines that are none are dropped
    assert path.exists()


def test_features_of_a_probe(plant, tmp_path):
    manifest = {"format": 1, "made_from": {"a": 1}, "left_out": {}}
    for name, kind in (
        ("features.npy", array),
        ("labels.npy", array),
        ("features.npy", plain_pickle),
        ("manifest.json", plain_pickle),
    ):
        np.save(tmp_path / "features.npy", np.zeros((6, 1), np.float32))
        np.save(tmp_path / "labels.npy", np.zeros(6, np.int64))
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        plant(kind, tmp_path / name)
        with pytest.raises(ValueError, match=r"are damaged .*: delete the folder"):
            open_features(tmp_path, {"a": 1}, (6, 1), None)


@pytest.mark.promise("S8")
def test_configurations(plant, refused, tmp_path):
    for kind in (yaml_object, plain_pickle):
        path = plant(kind, tmp_path / f"c{'.yaml' if kind is yaml_object else '.pkl'}")
        for verb, recipe in (("tokenizer", "demo"), ("probe", "digits"), ("pretrain", "demo")):
            refused([verb, recipe, "--config", path], path)


def test_images(good, plant, refused, tmp_path):
    for suffix in (".jpg", ".png", ".webp"):
        for number, kind in enumerate((plain_pickle, of_torch, array)):
            plant(kind, tmp_path / "images" / "a" / f"{number}{suffix}")
    for path in sorted((tmp_path / "images" / "a").iterdir()):
        refused(["predict", good / "w.safetensors", path, "--device", "cpu"], path)


def test_names_of_classes(good, plant, refused, tmp_path):
    command = ["segment", "digits", "--init", "null", "--data.path", good / "images"]
    command += ["--data.masks", good / "images", "--data.test_masks", good / "images"]
    command += ["--data.classes_file"]
    for kind, suffix in ((plain_pickle, ".json"), (old_pickle, ".json"), (plain_pickle, ".txt")):
        path = plant(kind, tmp_path / f"{kind.__name__}{suffix}")
        refused([*command, path], path)


def test_files_without_planted_code_are_read_by_the_same_calls(good, tmp_path):
    """So what is refused above is not refused for another reason."""
    torch.save({"model": {"a": torch.zeros(2)}}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").tensors.keys() == {"a"}
    sizes = {"encoder_width": 8, "decoder_width": 8, "decoder_input_width": 8}
    save_tokenizer(Dvae(DvaeConfig(vocab_size=8, **sizes)), tmp_path / "t.pt")
    load_tokenizer(tmp_path / "t.pt")
    command = ["predict", good / "w.safetensors", good / "images" / "red", "--device", "cpu"]
    assert main([str(argument) for argument in command]) == 0
