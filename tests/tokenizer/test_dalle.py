import hashlib
import json
import os
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

from beit_fast.cli import main
from beit_fast.tokenizer.checkpoint import load_tokenizer
from beit_fast.tokenizer.dalle import convert_dalle


@pytest.fixture
def files(dalle, save, tiny, tmp_path):
    """The arguments of convert_dalle for `tiny` in OpenAI's form, and how to write a half anew."""

    def write(name, module):
        save(module, tmp_path / f"{name}.pkl")

    write("encoder", dalle.half("Encoder", tiny.encoder))
    write("decoder", dalle.half("Decoder", tiny.decoder))
    paths = [tmp_path / name for name in ("encoder.pkl", "decoder.pkl", "dalle.safetensors")]
    return [str(path) for path in paths], write


def forget_dalle():
    for name in [name for name in sys.modules if name.split(".")[0] == "dall_e"]:
        del sys.modules[name]


def test_published_files_become_one_safetensors_file_with_equal_tensors(files, tiny):
    arguments, _ = files
    forget_dalle()  # the package is not installed where the files are converted
    path = convert_dalle(*arguments)
    assert str(path) == arguments[2]
    loaded = load_tokenizer(path)
    assert loaded.config == tiny.config
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    images = torch.rand(2, 3, 16, 24)
    assert torch.equal(loaded.encode(images), tiny.encode(images))
    assert "dall_e" not in sys.modules


def test_the_digests_of_the_sources_are_kept(files):
    (encoder, decoder, output), _ = files
    with safe_open(convert_dalle(encoder, decoder, output), framework="pt") as file:
        source = json.loads(file.metadata()["source"])
    for name, path in (("encoder", encoder), ("decoder", decoder)):
        with open(path, "rb") as content:
            digest = hashlib.sha256(content.read()).hexdigest()
        assert source[f"{name}_sha256"] == digest


def test_folders_are_made_and_nothing_is_replaced_unasked(files, tmp_path):
    (encoder, decoder, _), _ = files
    output = tmp_path / "new" / "folder" / "dalle.safetensors"
    convert_dalle(encoder, decoder, str(output))
    output.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"would be overwritten: .*or --overwrite true"):
        convert_dalle(encoder, decoder, str(output))
    assert output.read_bytes() == b"mine"
    arguments = ["--encoder", encoder, "--decoder", decoder, "--output", str(output)]
    assert main(["convert-dalle", *arguments, "--overwrite", "true"]) == 0
    load_tokenizer(output)


def refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_dalle(*arguments)
    assert not os.path.exists(arguments[2])


def test_code_beside_the_weights_is_refused_and_not_run(files, dalle, tiny, tmp_path):
    arguments, write = files
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    encoder = dalle.half("Encoder", tiny.encoder)
    encoder.blocks.input.device = Evil()
    write("encoder", encoder)
    refuse(arguments, r"encoder.pkl is refused: it names '(posix|nt).system'")
    assert not marker.exists()


def test_a_foreign_class_is_refused(files, dalle, tiny):
    arguments, write = files
    decoder = dalle.half("Decoder", tiny.decoder)
    decoder.blocks.group_2.add_module("norm", nn.GroupNorm(1, 8))
    write("decoder", decoder)
    refuse(arguments, "decoder.pkl is refused.*normalization.GroupNorm")


def test_weights_that_are_not_finite_are_refused_by_name(files, dalle, tiny):
    arguments, write = files
    encoder = dalle.half("Encoder", tiny.encoder)
    with torch.no_grad():
        encoder.blocks.input.b[1] = torch.nan
    write("encoder", encoder)
    refuse(arguments, r"encoder\.blocks\.input\.b holds values that are not finite")


def test_swapped_files_are_told_apart(files):
    (encoder, decoder, output), _ = files
    refuse([decoder, encoder, output], "decoder.pkl holds a dall_e.decoder.Decoder where")


def change_conv(module):
    module.blocks.group_1.block_1.res_path.conv_2.w = nn.Parameter(torch.zeros(2, 2, 5, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: delattr(m.blocks.output.conv, "b"), "encoder.blocks.output.conv.b is missing"),
        (
            lambda m: m.blocks.register_parameter("x", nn.Parameter(torch.zeros(1))),
            "'encoder.blocks.x' is foreign",
        ),
        (change_conv, r"conv_2.w is \(2, 2, 5, 5\) where \(2, 2, 3, 3\)"),
        (lambda m: setattr(m.blocks.group_3.block_2, "post_gain", 0.1), "group_3.block_2 by 0.1"),
    ],
    ids=["missing", "extra", "shape", "gain"],
)
def test_an_encoder_that_is_not_dalles_is_refused(files, dalle, tiny, change, message):
    arguments, write = files
    encoder = dalle.half("Encoder", tiny.encoder)
    change(encoder)
    write("encoder", encoder)
    refuse(arguments, message)


def test_halves_of_different_models_are_refused(files, dalle, tiny):
    arguments, write = files
    decoder = dalle.half("Decoder", tiny.decoder)
    decoder.blocks.input.w = nn.Parameter(torch.zeros(12, 25, 1, 1))
    write("decoder", decoder)
    refuse(arguments, r"decoder.blocks.input.w is \(12, 25, 1, 1\) where \(12, 24, 1, 1\)")
