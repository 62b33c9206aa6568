import json
import os
import re
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from beit_fast.cli import VERBS, WITHOUT_RECIPE
from beit_fast.seal import UNSEALED
from beit_fast.tokenizer.checkpoint import (
    FORMAT,
    infer_config,
    load_tokenizer,
    save_tokenizer,
)
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae
from damaged import damages, not_refused


def shapes_of(dvae):
    return {name: tuple(tensor.shape) for name, tensor in dvae.state_dict().items()}


@pytest.fixture
def path(tmp_path, tiny):
    path = tmp_path / "tokenizer.safetensors"
    save_tokenizer(tiny, path)
    return path


def rewrite(path, change, **metadata):
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        metadata = {k: v for k, v in file.metadata().items() if k not in UNSEALED} | metadata
    change(tensors)
    save_file(tensors, path, metadata)


def test_a_tokenizer_comes_back_equal_and_frozen(path, tiny):
    loaded = load_tokenizer(path)
    assert loaded.config == tiny.config
    assert not loaded.training
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.rand(2, 3, 16, 24)
    assert torch.equal(loaded.encode(images), tiny.encode(images))


def test_weights_in_channels_last_order_or_half_precision_survive(tmp_path, tiny):
    path = tmp_path / "half.safetensors"
    save_tokenizer(tiny.to(torch.bfloat16, memory_format=torch.channels_last), path)
    loaded = load_tokenizer(path)
    for name, tensor in tiny.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_tokenizer_that_diverged_is_refused_by_name(path, value):
    name = "encoder.blocks.output.conv.b"
    rewrite(path, lambda tensors: tensors[name].view(-1)[:2].fill_(value))
    with pytest.raises(ValueError, match=rf"1 tensors .* NaN or infinity \({name}\)"):
        load_tokenizer(path)


def test_metadata_is_json_and_says_where_the_weights_came_from(tmp_path, tiny):
    path = tmp_path / "tokenizer.safetensors"
    save_tokenizer(tiny, path, source={"run": "a run"})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT
    assert json.loads(metadata["source"]) == {"run": "a run"}
    assert DvaeConfig(**json.loads(metadata["config"])) == tiny.config


def test_saving_leaves_one_file_with_the_mode_of_the_umask(tmp_path, tiny):
    previous = os.umask(0o027)
    try:
        save_tokenizer(tiny, tmp_path / "tokenizer.safetensors")
    finally:
        os.umask(previous)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_behind(path, tiny, monkeypatch):
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_tokenizer(tiny, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError) as refusal:
        load_tokenizer(tmp_path / "none.safetensors")
    verbs = re.findall("`beit-fast ([a-z-]+)`", str(refusal.value))
    assert verbs == ["tokenizer", "convert-dalle"]
    assert set(verbs) <= {*VERBS, *WITHOUT_RECIPE}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.blocks.group_2.block_1.id_path.b"), "id_path.b is missing"),
        (lambda t: t.update({"__class__": torch.zeros(1)}), "'__class__' is foreign"),
        (
            lambda t: t.update({"encoder.blocks.output.conv.b": torch.zeros(25)}),
            r"conv.b is \(25,\) where \(24,\) belongs",
        ),
        (lambda t: t.clear(), "0 tensors"),
        (
            lambda t: t.update({f"x{i}": torch.zeros(0) for i in range(300)}),
            r"450 tensors where .* has 150",
        ),
    ],
    ids=["missing", "foreign", "shape", "empty", "flood"],
)
def test_tensors_that_are_not_those_of_a_dvae_are_named(path, change, message):
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "has the format 'pt'"),
        ({"config": "{"}, "config cannot be read"),
        ({"config": "[1]"}, "config cannot be read"),
        ({"config": '{"vocab_size": "many"}'}, "config cannot be read"),
        ({"config": '{"vocab_size": 25}'}, "says it holds"),
        ({"config": '{"blocks_per_group": 1000000000}'}, "says it holds"),
    ],
    ids=["format", "not-json", "a-list", "a-string", "other-size", "huge"],
)
def test_metadata_that_lies_is_refused(path, metadata, message):
    rewrite(path, lambda tensors: None, **metadata)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_a_file_without_metadata_is_refused(tmp_path, tiny):
    save_file(tiny.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="has the format None"):
        load_tokenizer(tmp_path / "bare.safetensors")


@pytest.mark.promise("S1")
def test_a_pickle_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    torch.save(Evil(), tmp_path / "evil.safetensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_tokenizer(tmp_path / "evil.safetensors")
    assert not marker.exists()


@pytest.mark.promise("R5", "R6")
def test_cut_and_altered_files_are_refused(path):
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 7, 8, header - 1, header, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"tokenizer\.safetensors"):
            load_tokenizer(path)
    for header_length in (2**40, 2**63 - 1, 0):
        path.write_bytes(header_length.to_bytes(8, "little") + content[8:])
        with pytest.raises(ValueError, match=r"tokenizer\.safetensors"):
            load_tokenizer(path)
    path.write_bytes(content)
    assert not_refused(path, damages(path, flips=100, zeroed=20), load_tokenizer) == []
    load_tokenizer(path)


@pytest.mark.parametrize(
    "config",
    [
        DvaeConfig(vocab_size=8, encoder_width=4, decoder_width=12, blocks_per_group=1),
        DvaeConfig(vocab_size=4096, encoder_width=64, decoder_width=32, decoder_input_width=7),
        DvaeConfig(blocks_per_group=3),
    ],
    ids=["small", "medium", "deep"],
)
def test_the_config_is_known_from_the_shapes(config):
    with torch.device("meta"):
        assert infer_config(shapes_of(Dvae(config))) == config
