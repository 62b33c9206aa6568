"""OpenAI's published dVAE, `encoder.pkl` and `decoder.pkl`, into one safetensors file.

The two files at cdn.openai.com/dall-e/ are whole pickled modules (215 and 175 MB). They are read
by `pickled_module`, which runs nothing, so neither the `dall_e` package nor trust is needed.

    beit-fast convert-dalle --encoder encoder.pkl --decoder decoder.pkl --output dalle.safetensors
"""

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from beit_fast.files import file_digest
from beit_fast.tokenizer.checkpoint import dvae_from_state, infer_config, save_tokenizer
from beit_fast.tokenizer.pickle_machine import PickledModule
from beit_fast.tokenizer.pickled_module import read_pickled_module

ENCODER, DECODER = "dall_e.encoder.Encoder", "dall_e.decoder.Decoder"
_BLOCKS = frozenset({"dall_e.encoder.EncoderBlock", "dall_e.decoder.DecoderBlock"})
CLASSES = _BLOCKS | {
    ENCODER,
    DECODER,
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
}


def convert_dalle(encoder: str, decoder: str, output: str, overwrite: bool = False) -> Path:
    """Convert OpenAI's pickled dVAE to one safetensors file, without running code from it.

    The widths come from the shapes of the tensors; the SHA-256 of both files goes into the
    metadata. Folders are made as needed. Raises FileNotFoundError, and ValueError for files that
    hold anything else and for an output that exists.

    Args:
        encoder: path of encoder.pkl
        decoder: path of decoder.pkl
        output: path of the safetensors file to write
        overwrite: replace an output that exists
    """
    if os.path.lexists(output) and not overwrite:
        raise ValueError(
            f"{output} would be overwritten: pass another path, or --overwrite true "
            "(overwrite=True) to replace it"
        )
    encoder_module, read_encoder = _open(Path(encoder), ENCODER)
    decoder_module, read_decoder = _open(Path(decoder), DECODER)
    shapes = {
        **_shapes("encoder", encoder_module),
        **_shapes("decoder", decoder_module),
    }
    config = infer_config(shapes)
    state = {f"encoder.{name}": tensor for name, tensor in read_encoder().items()}
    state |= {f"decoder.{name}": tensor for name, tensor in read_decoder().items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite: download the files again")
    dvae = dvae_from_state(config, state)
    for path, module, ours in (
        (encoder, encoder_module, dvae.encoder),
        (decoder, decoder_module, dvae.decoder),
    ):
        _check_gain(path, module, ours.blocks["group_1"]["block_1"].gain)
    source = {"encoder_sha256": file_digest(encoder), "decoder_sha256": file_digest(decoder)}
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    save_tokenizer(dvae, output, source=source)
    return Path(output)


def _open(path: Path, class_name: str) -> tuple[PickledModule, Callable[[], dict[str, Tensor]]]:
    module, read = read_pickled_module(path, CLASSES)
    if module.class_name != class_name:
        raise ValueError(
            f"{path} holds a {module.class_name} where a {class_name} belongs: pass encoder.pkl as "
            "the encoder and decoder.pkl as the decoder"
        )
    return module, read


def _shapes(prefix: str, module: PickledModule) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.{path}.{name}": tensor.shape
        for path, child in module.modules()
        for name, tensor in child.tensors.items()
    }


def _check_gain(path: str, module: PickledModule, gain: float) -> None:
    """The gain is no tensor, so shapes cannot tell: a file with another one would mistokenize."""
    for name, block in module.modules():
        if block.class_name in _BLOCKS and block.attributes.get("post_gain") != gain:
            raise ValueError(
                f"{path} scales the branch of {name} by {block.attributes.get('post_gain')} where "
                f"a dVAE of this depth has {gain}: its tokens would differ from the original's"
            )
