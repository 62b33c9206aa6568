"""A dVAE of 58,000 parameters, and files of the form in which OpenAI published theirs."""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae

TINY = DvaeConfig(
    vocab_size=24, encoder_width=8, decoder_width=8, decoder_input_width=12, blocks_per_group=2
)


@pytest.fixture
def tiny() -> Dvae:
    torch.manual_seed(1)
    dvae = Dvae(TINY)
    for name, parameter in dvae.named_parameters():
        if name.endswith(".b"):
            # Zero would hide a forgotten bias; negative ones might silence a ReLU for good.
            nn.init.uniform_(parameter, 0, 0.2)
    with torch.no_grad():  # without this one code would win nearly everywhere
        logits = dvae.encoder(
            torch.rand(16, 3, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
        )
        dvae.encoder.blocks["output"]["conv"].b -= logits.mean(dim=(0, 2, 3))
    return dvae


class DallE:
    """The classes of the `dall_e` package, by name alone, while a test pickles them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        for name in ("dall_e", "dall_e.encoder", "dall_e.decoder", "dall_e.utils"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        self.classes = {}
        for full_name in (
            "dall_e.encoder.Encoder",
            "dall_e.encoder.EncoderBlock",
            "dall_e.decoder.Decoder",
            "dall_e.decoder.DecoderBlock",
            "dall_e.utils.Conv2d",
        ):
            module, _, name = full_name.rpartition(".")
            made = type(name, (nn.Module,), {"__module__": module})
            setattr(sys.modules[module], name, made)
            self.classes[name] = made

    def conv(self, conv: nn.Module, use_float16: bool = True) -> nn.Module:
        made = self.classes["Conv2d"]()
        made.n_out, made.n_in, made.kw, _ = conv.w.shape
        made.use_float16, made.device, made.requires_grad = (
            use_float16,
            torch.device("cpu"),
            False,
        )
        made.w = nn.Parameter(conv.w.detach().clone(), requires_grad=False)
        made.b = nn.Parameter(conv.b.detach().clone(), requires_grad=False)
        return made

    def half(self, kind: str, half: nn.Module) -> nn.Module:
        """Our encoder or decoder as the module that OpenAI pickled. kind: Encoder or Decoder."""
        made = self.classes[kind]()
        made.device, made.requires_grad, made.use_mixed_precision = torch.device("cpu"), False, True
        made.n_hid, made.n_blk_per_group = 8, len(half.blocks["group_1"])
        parts = [("input", self.conv(half.blocks["input"], kind == "Encoder"))]
        for g in range(1, 5):
            blocks = [(name, self.block(kind, b)) for name, b in half.blocks[f"group_{g}"].items()]
            if g < 4 and kind == "Encoder":
                blocks.append(("pool", nn.MaxPool2d(kernel_size=2)))
            elif g < 4:
                blocks.append(("upsample", nn.Upsample(scale_factor=2, mode="nearest")))
            parts.append((f"group_{g}", nn.Sequential(OrderedDict(blocks))))
        output = self.conv(half.blocks["output"]["conv"], kind == "Decoder")
        parts.append(("output", nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=output))))
        made.blocks = nn.Sequential(OrderedDict(parts))
        return made

    def block(self, kind: str, block: nn.Module) -> nn.Module:
        made = self.classes[f"{kind}Block"]()
        made.n_layers, made.post_gain, made.device = 8, block.gain, torch.device("cpu")
        identity = isinstance(block.id_path, nn.Identity)
        made.id_path = nn.Identity() if identity else self.conv(block.id_path)
        path = OrderedDict()
        for i in range(1, 5):
            path[f"relu_{i}"] = nn.ReLU()
            path[f"conv_{i}"] = self.conv(block.res_path[f"conv_{i}"])
        made.res_path = nn.Sequential(path)
        return made


@pytest.fixture
def dalle(monkeypatch: pytest.MonkeyPatch) -> DallE:
    return DallE(monkeypatch)


def _save_archive(value: object, path: Path) -> None:
    torch.save(value, path)


def _save_stream(value: object, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the source text of the classes it saves
        torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.fixture(params=[_save_archive, _save_stream], ids=["archive", "stream"])
def save(request: pytest.FixtureRequest) -> Callable[[object, Path], None]:
    """torch.save in its zip layout, and in the layout from before torch 1.6."""
    return request.param
