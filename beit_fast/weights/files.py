"""Tensors out of files and into them: .pth, .safetensors, shards, folders of runs and of the hub.

Nothing of a file is run: safetensors and JSON hold no code, and a pickle that needs any is refused.
"""

import argparse
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from beit_fast.files import file_digest, refuse_long_header, refuse_other_kinds, replace_file
from beit_fast.manifest import MANIFEST, read_manifest
from beit_fast.seal import UNSEALED, check_seal, replace_safetensors
from beit_fast.weights.description import (
    Description,
    description_of_metadata,
    description_of_settings,
    read_json,
    step_of,
)

ROOT_KEYS = ("model", "module", "state_dict")  # unilm; DeepSpeed; mmseg
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What torch.load raises for bytes that torch.save did not write.
_DAMAGE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,  # a cut archive: Invalid argument
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class WeightFile:
    """Tensors as they are named in the file, and what stands beside them."""

    tensors: dict[str, Tensor]
    said: Description = field(default_factory=Description)  # by a run or a file of ours
    hf_config: dict[str, Any] | None = None  # config.json
    path: Path = field(default_factory=Path)


def read_weights(path: str | Path, *, key: str | None = None) -> WeightFile:
    """The tensors of a file or a folder, on the CPU, in the dtype they are stored in.

    A file is .safetensors, an index of shards (.index.json), or anything `torch.save` wrote; one
    of a run's step is read with the manifest beside it. A folder is one of transformers or timm
    (config.json), a step of a run of ours, or the run's output, of which the newest step is taken.
    A file with a seal (`beit_fast.seal`) is checked against it, shards too.
    `key` chooses the weights in a file that has more than one set, "model_ema" in unilm's, "ema" in
    a run's; without it "model", "module" or "state_dict", or the root. Values are as they are
    stored, NaN too.
    Raises FileNotFoundError, and ValueError that names the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, key)
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no weights at {path}: pass a .pth or .safetensors file, a folder with "
            "config.json, a run's output, or one of the names in beit_fast.PUBLISHED"
        )
    refuse_other_kinds(path, "weights")
    if path.name.endswith(".index.json"):
        return WeightFile(_read_shards(path, key), path=path)
    if path.suffix != ".safetensors":
        return _read_torch(path, key)
    if key is not None:
        raise ValueError(f"{path} holds one set of weights: pass no key ({key!r})")
    if (step := step_of(path)) is not None:
        return _read_run_step(step, path.stem)
    refuse_long_header(path)
    check_seal(path)
    return _read_safetensors(path)


def write_weights(
    path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] = {}
) -> None:
    """Write `path`: safetensors if it ends so, else by `torch.save`, `tensors` being its root.

    Written beside `path` and renamed, so that an interrupted call leaves the old file whole.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        flat = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        content = save(_unshare(flat), {"format": "pt", **metadata, **UNSEALED})
        replace_safetensors(path, content)
    else:
        replace_file(path, lambda file: torch.save(tensors, file))


def _read_folder(path: Path, key: str | None) -> WeightFile:
    if (step := step_of(path)) is not None:
        return _read_run_step(step, key or "model")
    weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise ValueError(
            f"{path} holds none of {', '.join(_WEIGHTS)}, and no checkpoint of a run: pass the "
            "file's own path; a run has none before its first --run.save_every steps or a stop"
        )
    file = read_weights(weights, key=key)
    config = path / "config.json"
    hf_config = read_json(config) if config.is_file() else None
    return WeightFile(file.tensors, file.said, hf_config, weights)


def _read_run_step(path: Path, key: str) -> WeightFile:
    """One weight file of a step's folder, against its digest (`beit_fast.train.state` writes it).

    The optimiser's file, twice as large, stays unread.
    """
    manifest = read_manifest(path)
    files, name = manifest["files"], f"{key}.safetensors"
    if name not in files:
        raise ValueError(f"{path} has {', '.join(sorted(files))}, no {name}: pass another key")
    if not (path / name).is_file():
        raise ValueError(f"{path / name} is missing, manifest.json lists it: copy the step anew")
    if file_digest(path / name) != files[name]:
        raise ValueError(f"{path / name} is damaged: its SHA-256 is not the one it was saved with")
    weights = _read_safetensors(path / name)
    said = description_of_settings(manifest["settings"], path / MANIFEST)
    return WeightFile(weights.tensors, said, path=path)


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): copy or write it anew"
        ) from error
    return WeightFile(tensors, description_of_metadata(metadata, path), path=path)


def _read_shards(path: Path, key: str | None) -> dict[str, Tensor]:
    homes = read_json(path).get("weight_map")
    if not isinstance(homes, dict) or not all(isinstance(home, str) for home in homes.values()):
        raise ValueError(f"{path} has no weight_map of names to files: copy it anew")
    tensors: dict[str, Tensor] = {}
    for home in sorted(set(homes.values())):
        shard = path.parent / home
        if Path(home).name != home:
            raise ValueError(f"{path} points at {home!r}, outside its folder: it is refused")
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing, {path.name} lists it: copy it too")
        held = read_weights(shard, key=key).tensors
        wanted = {name for name, other in homes.items() if other == home}
        if wanted != held.keys():
            names = sorted(wanted ^ held.keys())
            raise ValueError(f"{shard} and {path.name} disagree on {names[:8]}: copy both anew")
        tensors |= held
    return tensors


def _read_torch(path: Path, key: str | None) -> WeightFile:
    try:
        # unilm keeps its command line beside the weights, a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols torch.save does not write
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text begins with the advice to read it without care, which is not ours.
        lines = str(error).splitlines()
        reasons = [line for line in lines if "GLOBAL" in line or line.startswith("Unsupported")]
        reason = reasons[0].strip().partition(". ")[0] if reasons else "no pickle of tensors"
        raise ValueError(
            f"{path} needs code of its own to be read, or is damaged ({reason}): "
            "nothing of it was run; save its state dict alone where you trust it, "
            "torch.save({'model': state_dict}, ...)"
        ) from error
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is no whole file of torch.save ({error}): copy it anew"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    if key is not None and key not in content:
        raise ValueError(f"{path} has no {key!r}: pass one of {', '.join(map(str, content))}")
    found = next((name for name in ROOT_KEYS if isinstance(content.get(name), Mapping)), None)
    chosen = key or found
    state = content if chosen is None else content[chosen]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: {chosen!r} is a {type(state).__name__}, not tensors by name")
    foreign = [str(name) for name, value in state.items() if not _is_dense(value)]
    if foreign:
        raise ValueError(
            f"{path}: these are no dense tensors: {', '.join(sorted(foreign)[:8])}; pass key"
        )
    # Beside unilm's root key, as in a safetensors file's metadata.
    texts = {name: text for name, text in content.items() if isinstance(text, str)}
    return WeightFile(dict(state), description_of_metadata(texts, path), path=path)


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _unshare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses views of one storage, which a joined q, k, v gives when it is split."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensors[name].untyped_storage().data_ptr())
    return tensors
