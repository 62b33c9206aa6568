"""A trained tokenizer in one safetensors file: names, shapes and config, and nothing that can run.

The metadata of the file holds the format's name, the config as JSON and where the weights came
from. Reading checks the file against its seal, and every name and shape against the config, before
a single tensor is read.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from beit_fast.files import refuse_long_header, refuse_other_kinds
from beit_fast.seal import UNSEALED, check_seal, replace_safetensors
from beit_fast.tokenizer.config import NUM_GROUPS, DvaeConfig
from beit_fast.tokenizer.dvae import Dvae

FORMAT = "beit_fast.dvae"


def save_tokenizer(dvae: Dvae, path: str | Path, *, source: Mapping[str, str] = {}) -> None:
    """Write the weights of `dvae` and its config to `path`, a safetensors file.

    Written beside `path` and renamed, so that an interrupted call leaves the old file whole.
    `source` says in a few strings where the weights came from; it lands in the metadata.
    Raises OSError where the file cannot be written.
    """
    path = Path(path)
    tensors = {name: tensor.contiguous() for name, tensor in dvae.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(dvae.config)),
        "source": json.dumps(dict(source)),
        **UNSEALED,
    }
    replace_safetensors(path, save(tensors, metadata))


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu") -> Dvae:
    """Read a dVAE that `save_tokenizer` or `convert_dalle` wrote, ready to encode.

    In eval mode, without gradients, with its weights in channels-last order (what the
    convolutions read fastest). Raises FileNotFoundError, and ValueError for a file that is
    damaged, of another format, or whose tensors do not fit its config.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no tokenizer at {path}: train one with `beit-fast tokenizer`, "
            "or convert DALL-E's with `beit-fast convert-dalle`"
        )
    refuse_other_kinds(path, "a tokenizer")
    refuse_long_header(path)
    check_seal(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            config = _read_config(file.metadata(), path)
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            inferred = _inferred(shapes, path)
            if config != inferred:
                raise ValueError(
                    f"{path} says it holds {config}, but its tensors are those of {inferred}: "
                    "it is damaged, write it anew"
                )
            state = {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): copy or write it anew"
        ) from error
    return dvae_from_state(config, state)


def tokenizer_digest(dvae: Dvae) -> str:
    """SHA-256 of a tokenizer's weights, wherever their file lies."""
    digest = hashlib.sha256()
    for name, tensor in sorted(dvae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def dvae_from_state(config: DvaeConfig, state: dict[str, Tensor]) -> Dvae:
    """A frozen dVAE over `state` (not copied), whose names and shapes `infer_config` accepted.

    Raises ValueError for NaN or infinity: every token would be the same, and nothing would say so.
    """
    bad = sorted(name for name, tensor in state.items() if not _is_finite(tensor))
    if bad:
        raise ValueError(
            f"{len(bad)} tensors of the tokenizer have NaN or infinity ({', '.join(bad[:5])}): "
            "take weights from before its training diverged"
        )
    with torch.device("meta"):
        dvae = Dvae(config)
    dvae.load_state_dict(state, strict=True, assign=True)
    dvae.eval().requires_grad_(False)
    return dvae.to(memory_format=torch.channels_last)


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> DvaeConfig:
    """The config whose dVAE has exactly these tensors, named encoder.* and decoder.*.

    Raises ValueError that lists missing, foreign and misshapen tensors; nothing of the size that
    the shapes claim is allocated.
    """
    pattern = re.compile(r"encoder\.blocks\.group_1\.block_\d+\.res_path\.conv_1\.w")
    try:
        config = DvaeConfig(
            vocab_size=shapes["encoder.blocks.output.conv.w"][0],
            encoder_width=shapes["encoder.blocks.input.w"][0],
            decoder_width=shapes["decoder.blocks.output.conv.w"][1],
            decoder_input_width=shapes["decoder.blocks.input.w"][0],
            blocks_per_group=sum(pattern.fullmatch(name) is not None for name in shapes),
        )
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"no dVAE has these {len(shapes)} tensors: {error} (its widths are read from the first "
            "and the last convolution of encoder and decoder)"
        ) from error
    # 8 tensors a block; 4 for input and output, and 3 or 4 shortcuts: 74 + 76 for DALL-E's.
    expected_count = 2 * 8 * NUM_GROUPS * config.blocks_per_group + 2 * 4 + 2 * (3 + 4)
    if len(shapes) > 2 * expected_count or expected_count > 2 * len(shapes):
        raise ValueError(f"{len(shapes)} tensors where {config} has {expected_count}")
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in Dvae(config).state_dict().items()}
    problems = [
        *(f"{name} is missing" for name in expected.keys() - shapes.keys()),
        *(f"{name!r} is foreign" for name in shapes.keys() - expected.keys()),
        *(
            f"{name} is {tuple(shapes[name])} where {expected[name]} belongs"
            for name in expected.keys() & shapes.keys()
            if tuple(shapes[name]) != expected[name]
        ),
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise ValueError(f"the tensors are not those of a dVAE, {len(problems)} differ: {shown}")
    return config


def _inferred(shapes: Mapping[str, tuple[int, ...]], path: Path) -> DvaeConfig:
    try:
        return infer_config(shapes)
    except ValueError as error:
        raise ValueError(f"{path} is no whole tokenizer, write it anew: {error}") from error


def _is_finite(tensor: Tensor) -> bool:
    # A sum is finite only if all are; it may also overflow.
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def _read_config(metadata: dict[str, str] | None, path: Path) -> DvaeConfig:
    found = (metadata or {}).get("format")
    if found != FORMAT:
        raise ValueError(
            f"{path} has the format {found!r:.80}, a tokenizer has {FORMAT!r}: pass a file "
            "written by save_tokenizer or convert_dalle"
        )
    try:
        return DvaeConfig(**json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: its config cannot be read ({error}): write the file anew"
        ) from error
