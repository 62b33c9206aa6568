"""What reading tells of weights: values that are not finite, fp8, what the names leave open."""

import shutil

import pytest
import torch

from beit_fast.model.heads import BeitForImageClassification
from beit_fast.weights.convert import convert
from beit_fast.weights.description import description_of
from beit_fast.weights.files import read_weights
from beit_fast.weights.load import from_pretrained, load_pretrained
from beit_fast.weights.read import read_checkpoint
from beit_fast.weights.save import save_pretrained
from tiny_models import PER_BLOCK


def test_transformers_names_without_their_config_leave_the_epsilon_open(tiny, randomize, tmp_path):
    from transformers import BeitForImageClassification as Theirs

    save_pretrained(randomize(BeitForImageClassification(tiny(**PER_BLOCK))), tmp_path)
    Theirs.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    lone = shutil.copy(tmp_path / "theirs" / "model.safetensors", tmp_path / "lone.safetensors")
    (guess,) = read_checkpoint(lone).guesses
    assert guess.startswith("norm_eps is 1e-06: transformers' files have 1e-12")
    assert read_checkpoint(lone, norm_eps=1e-12).guesses == ()
    assert read_checkpoint(tmp_path / "theirs").guesses == ()


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
