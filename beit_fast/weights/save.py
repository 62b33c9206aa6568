"""Weights of the models here into files that transformers, unilm and timm read.

save_pretrained(model, "folder")  # transformers' from_pretrained("folder") reads it
"""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from beit_fast.files import replace_file
from beit_fast.model.beit import Beit
from beit_fast.weights.description import Description, Statistics
from beit_fast.weights.files import write_weights
from beit_fast.weights.hf_config import hf_config_of, transformers_differs
from beit_fast.weights.layouts import from_house, with_zero_biases
from beit_fast.weights.read import Weights, task_of

logger = logging.getLogger("beit_fast.model")

# The last is written by `beit-fast convert`; an old one would belong to another model.
HF_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


def save_pretrained(
    model: Beit,
    folder: str | Path,
    *,
    labels: Sequence[str] | None = None,
    statistics: Statistics | None = None,
) -> Path:
    """Write config.json and model.safetensors that transformers' BEiT classes read, and ours too.

    The names are those of the hub's files, which transformers 4 and 5 both read; biases that the
    model does not have are zeros there. `labels` names the classes, in order; `statistics`, "half",
    "imagenet" or mean and std, is kept beside the weights for `evaluate` and its like. What was
    saved there is replaced, as transformers' method does.
    Warns where transformers computes something else with these files: it reads positions of a grid
    that is not square as if height were width, and a segmenter's blocks two too early. Raises
    ValueError where it has no such BEiT.
    """
    task = task_of(model.state_dict())
    weights = Weights(
        state=dict(model.state_dict()),
        config=model.config,
        task=task,
        layout="house",
        statistics=statistics,
    )
    write_hf(weights, Path(folder), labels)
    for warning in transformers_differs(model.config):
        logger.warning("%s", warning)
    return Path(folder)


def push_to_hub(
    model: Beit,
    repo_id: str,
    *,
    labels: Sequence[str] | None = None,
    statistics: Statistics | None = None,
    private: bool | None = None,
    commit_message: str = "Upload BEiT",
) -> str:
    """`save_pretrained` into a repository of the Hugging Face hub, made if need be; its address.

    Raises as `save_pretrained` does, and what huggingface_hub raises.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, labels=labels, statistics=statistics)
        api = HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(address)


def _description(weights: Weights, labels: Sequence[str] | None) -> dict[str, str]:
    """What a file says of itself, as its metadata."""
    has_classes = weights.task in ("classifier", "segmentation")
    said = Description(
        config=dataclasses.asdict(weights.config),
        classes=tuple(labels) if labels is not None and has_classes else None,
        statistics=weights.statistics,
        crop_pct=weights.crop_pct,
    )
    said.check_statistics()
    return said.metadata()


def write_house(weights: Weights, state: dict[str, Tensor], target: Path, to: str) -> None:
    """Write unilm's or timm's file of these tensors, its folder made as needed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    segmentation = to == "unilm" and weights.task == "segmentation"
    if segmentation:
        heads = ("decode_head.", "auxiliary_head.")
        state = {n if n.startswith(heads) else f"backbone.{n}": t for n, t in state.items()}
    said = _description(weights, weights.labels)
    if target.suffix == ".safetensors":
        write_weights(target, state, metadata=said)
    elif to == "unilm":
        write_weights(target, {"state_dict" if segmentation else "model": state, **said})
    else:
        write_weights(target, state)


def write_hf(weights: Weights, folder: Path, labels: Sequence[str] | None) -> int:
    """Write transformers' folder; how many tensors it holds."""
    config = hf_config_of(
        weights.config,
        weights.task,
        labels=labels,
        has_mask_token="mask_token" in weights.state,
    )
    dtype = str(weights.state["cls_token"].dtype).removeprefix("torch.")
    said = _description(weights, labels)
    renamed = from_house(with_zero_biases(weights.state, weights.config), "hf4")
    if config["architectures"] == ["BeitModel"]:
        renamed = {name.removeprefix("beit."): tensor for name, tensor in renamed.items()}
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**config, "torch_dtype": dtype}, indent=2, sort_keys=True) + "\n"
    write_weights(folder / "model.safetensors", renamed, metadata=said)
    replace_file(folder / "config.json", lambda file: file.write(content.encode()))
    return len(renamed)
