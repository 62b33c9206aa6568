"""Weights between unilm, timm, transformers and the models here: read, load, write, convert.

    model = from_pretrained("microsoft/beit-base-patch16-224", img_size=384, num_classes=10)
    report = load_pretrained(model, "runs/small")
    save_pretrained(model, "folder")  # transformers' from_pretrained("folder") reads it

Whatever does not fit is an error that lists it, before anything is changed. What a task adds (a
head, its norm, the mask token) may be left out or stay fresh, and the report says so by name.
"""

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table
from beit_fast.weights.description import Description, Statistics, step_of
from beit_fast.weights.files import replace_file, write_weights
from beit_fast.weights.hf_config import hf_config_of, transformers_differs
from beit_fast.weights.layouts import SEGMENTATION, from_house, shorten, with_zero_biases
from beit_fast.weights.read import (
    MODEL_CLASSES,
    OWN_TABLE,
    SHARED_TABLE,
    Source,
    Task,
    Weights,
    compare_tensors,
    read_checkpoint,
    task_of,
)

logger = logging.getLogger("beit_fast.model")

# The last is written by `beit-fast convert`; an old one would belong to another model.
_HF_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
# What a task adds to the encoder: absent as a whole it stays fresh, unwanted it is left out.
_TASK_PARTS = ("mask_token", "norm", "fc_norm", "head", "lm_head", "fpn1", "fpn2")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of each tensor, by name; `str()` tells it in a few lines."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...] = ()  # positions, to another grid
    expanded: tuple[str, ...] = ()  # the shared table, copied to each block
    fresh: tuple[str, ...] = ()  # the source has none that fits: as the model was built
    left_out: tuple[str, ...] = ()  # the model has no place for them
    dropped: tuple[str, ...] = ()  # index buffers
    notes: tuple[str, ...] = ()  # differences that no shape shows

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        for field_name in ("resized", "expanded", "dropped"):
            if names := getattr(self, field_name):
                lines.append(f"{field_name}: {shorten(sorted(names), 2)}")
        for field_name in ("fresh", "left_out"):
            if names := getattr(self, field_name):
                lines.append(f"{field_name.replace('_', ' ')}: {', '.join(sorted(names))}")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What `convert` read and wrote."""

    source: str
    target: str
    task: Task
    layout: str
    config: BeitConfig
    read: int  # tensors
    written: int
    dropped: tuple[str, ...] = field(default=())
    left_out: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())  # what was taken by custom, and what is lost

    def __str__(self) -> str:
        c, (height, width) = self.config, self.config.image_pixels
        lines = [
            f"{self.source}: {self.layout} names, {self.task}, {c.depth} blocks of {c.embed_dim}, "
            f"{height}x{width} px",
            f"{self.target}: {self.read} tensors became {self.written}",
        ]
        if self.dropped:
            lines.append(f"dropped: {len(self.dropped)} relative_position_index")
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join([*lines, *self.notes])


def load_pretrained(model: Beit, source: Source, *, key: str | None = None) -> LoadReport:
    """Load a checkpoint into `model`, whose config decides: positions are fitted to it.

    A shared table is copied to each block where the blocks have tables; tables and positions of
    another grid are resized (exactly as unilm does); a head with other classes stays fresh, and so
    does what the source's task does not have, with the values `model` has. dtype and device are the
    model's. Where the source does not say its heads they are the model's, and where its positions
    are as many as the model's grid has, that is their grid. `source` and `key`: as for
    `read_checkpoint`.
    Raises ValueError, before a weight is changed, for anything else that does not fit.
    """
    weights = read_checkpoint(source, key=key, unless_stated=_unless_stated(model.config))
    prepared, report = _fit(weights, model)
    model.load_state_dict({**model.state_dict(), **prepared}, strict=True)
    return report


def from_pretrained(
    source: Source,
    model_class: type[Beit] | None = None,
    *,
    key: str | None = None,
    **overrides: Any,
) -> Beit:
    """A model of the checkpoint's config, its weights loaded, in eval mode and in their dtype.

    `model_class` is that of the checkpoint's task unless given; `overrides` replace fields of the
    config: `img_size=384` resizes the positions, `num_classes=10` gives a fresh head (a pre-trained
    checkpoint has 0 classes), `use_rel_pos_bias=True, use_shared_rel_pos_bias=False` a table for
    each block, as fine-tuning has. Where the checkpoint does not say its heads, `num_heads` does;
    where its positions are as many as the grid of `img_size` has, that is their grid. What is
    fresh, left out or guessed is logged as a warning; `load_pretrained` returns it.
    Raises as `read_checkpoint` and `load_pretrained` do.
    """
    weights = read_checkpoint(source, key=key, unless_stated=overrides)
    model_class = model_class or MODEL_CLASSES.get(weights.task, Beit)
    model = model_class(dataclasses.replace(weights.config, **overrides))
    model.to(weights.state["cls_token"].dtype)
    report = load_pretrained(model, weights)
    if report.fresh or report.left_out or weights.guesses:
        logger.warning("%s", report)
    return model.eval()


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
    that is not square as if height were width. Raises ValueError where it has no such BEiT.
    """
    task = task_of(model.state_dict())
    weights = Weights(
        state=dict(model.state_dict()),
        config=model.config,
        task=task,
        layout="house",
        statistics=statistics,
    )
    return _write_hf(weights, Path(folder), labels)


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


def convert(
    source: Source,
    target: str | Path,
    *,
    to: Literal["unilm", "timm", "hf"],
    key: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    statistics: Statistics | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write a checkpoint in another layout; dtypes stay, and so does every value.

    "unilm" and "timm" write one file, .safetensors or anything else by `torch.save`, unilm's under
    its root key; "hf" writes a folder. Folders are made as needed. timm has no masked image
    modelling and no segmentation: those parts are left out, and named in the report. Config, names
    of classes and statistics go along, but in timm's layout by `torch.save`, which has no place for
    them. `img_size` and `num_heads` are those of the source, where it does not say them;
    `statistics` ("half", "imagenet", or mean and std of pixels) are else the source's.
    Raises ValueError for a target that exists unless `overwrite`, and as `read_checkpoint` does.
    """
    target = Path(target)
    _check_target(target, to, overwrite)
    given = {"img_size": img_size, "num_heads": num_heads}
    given = {name: value for name, value in given.items() if value is not None}
    weights = read_checkpoint(source, key=key, unless_stated=given)
    for name, value in given.items():
        _check_given(name, value, weights.config)
    if statistics is not None:
        weights = dataclasses.replace(weights, statistics=statistics)
    state, left_out, notes = weights.state, (), weights.guesses
    if to == "hf":
        left_out = tuple(sorted(name for name in state if name.startswith("cls_pt_layers.")))
        kept = {name: tensor for name, tensor in state.items() if name not in left_out}
        weights = dataclasses.replace(weights, state=kept)
        _write_hf(weights, target, weights.labels)
        written = len(from_house(with_zero_biases(kept, weights.config), "hf4"))
    else:
        if to == "timm":
            left_out = tuple(sorted(name for name in state if _timm_lacks(name)))
            state = {name: tensor for name, tensor in state.items() if name not in left_out}
        if to == "timm" and target.suffix != ".safetensors":
            notes += (
                f"{target.name} has no place for config, classes and statistics: read it with "
                "img_size and num_heads where its shapes do not show them, or write .safetensors",
            )
        _write_house(weights, state, target, to)
        written = len(state)
    return ConvertReport(
        source="the state dict" if isinstance(source, Mapping) else str(source),
        target=str(target),
        task=weights.task,
        layout=weights.layout,
        config=weights.config,
        read=len(weights.state) + len(left_out) * (to == "hf"),
        written=written,
        dropped=weights.dropped,
        left_out=left_out,
        notes=notes,
    )


def _check_target(target: Path, to: str, overwrite: bool) -> None:
    """Raise ValueError where `convert` cannot write, or should not."""
    if to not in ("unilm", "timm", "hf"):
        raise ValueError(f"there is no layout {to!r}: pass 'unilm', 'timm' or 'hf'")
    if to == "hf" and target.is_file():
        raise ValueError(f"{target} is a file: --to hf writes a folder, pass its path")
    if to != "hf" and target.is_dir():
        raise ValueError(f"{target} is a folder: --to {to} writes a file, pass its path")
    files = [target / name for name in _HF_FILES] if to == "hf" else [target]
    existing = [str(file) for file in files if os.path.lexists(file)]
    if special := [name for name in existing if os.path.exists(name) and not os.path.isfile(name)]:
        raise ValueError(
            f"{' and '.join(special)} is no file, and nothing takes its place: pass another path"
        )
    weights = target / "model.safetensors" if to == "hf" else target
    if step_of(weights) is not None or any(target.glob("checkpoints/step_*")):
        raise ValueError(
            f"{target} is of a run, whose checkpoints stay as they were written: pass another path"
        )
    if existing and not overwrite:
        raise ValueError(
            f"{' and '.join(existing)} would be overwritten: pass another path, or --overwrite "
            "(overwrite=True) to replace what is there"
        )


def _check_given(name: str, value: Any, config: BeitConfig) -> None:
    is_size = name == "img_size"
    theirs = config.image_pixels if is_size else config.num_heads
    ours = dataclasses.replace(config, img_size=value).image_pixels if is_size else value
    if ours != theirs:
        raise ValueError(
            f"{name} {value} was given, the source has {theirs}: a conversion changes no model, "
            f"leave {name} out (from_pretrained resizes positions)"
        )


def _unless_stated(config: BeitConfig) -> dict[str, Any]:
    return {"img_size": config.img_size, "num_heads": config.num_heads}


def _description(weights: Weights, labels: Sequence[str] | None) -> dict[str, str]:
    """What a file says of itself, as its metadata."""
    is_classifier = weights.task == "classifier"
    said = Description(
        config=dataclasses.asdict(weights.config),
        classes=tuple(labels) if labels is not None and is_classifier else None,
        statistics=weights.statistics,
    )
    said.check_statistics()
    return said.metadata()


def _write_house(weights: Weights, state: dict[str, Tensor], target: Path, to: str) -> None:
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


def _write_hf(weights: Weights, folder: Path, labels: Sequence[str] | None) -> Path:
    config = hf_config_of(
        weights.config,
        weights.task,
        labels=labels,
        taps=weights.taps,
        has_mask_token="mask_token" in weights.state,
    )
    dtype = str(weights.state["cls_token"].dtype).removeprefix("torch.")
    said = _description(weights, labels)
    if warning := transformers_differs(weights.config):
        logger.warning("%s", warning)
    renamed = from_house(with_zero_biases(weights.state, weights.config), "hf4")
    if config["architectures"] == ["BeitModel"]:
        renamed = {name.removeprefix("beit."): tensor for name, tensor in renamed.items()}
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**config, "torch_dtype": dtype}, indent=2, sort_keys=True) + "\n"
    write_weights(folder / "model.safetensors", renamed, metadata=said)
    replace_file(folder / "config.json", lambda file: file.write(content.encode()))
    return folder


def _fit(weights: Weights, model: Beit) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors to load, of the model's shapes, and the report. Changes nothing."""
    wanted = model.state_dict()
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError(
            "the model is on the meta device: call to_empty(device=...) and init_weights(), or use "
            "from_pretrained"
        )
    source, target = weights.config, model.config
    if "num_heads" in weights.stated and source.num_heads != target.num_heads:
        raise ValueError(f"{source.num_heads} heads in the source, {target.num_heads} here: "
                         f"build the model with num_heads={source.num_heads}")  # fmt: skip
    state, expanded = dict(weights.state), ()
    own = [OWN_TABLE.format(block) for block in range(target.depth)]
    if (
        SHARED_TABLE in state
        and SHARED_TABLE not in wanted
        and not any(name in state for name in own)
    ):
        expanded = tuple(name for name in own if name in wanted)
        if expanded:
            shared = state.pop(SHARED_TABLE)
            state |= dict.fromkeys(expanded, shared)
    resized = _resize(state, source.grid, target.grid)

    fresh, left_out = set(), set()
    for part in _TASK_PARTS:
        ours = {name for name in wanted if name.split(".")[0] == part}
        theirs = {name for name in state if name.split(".")[0] == part}
        other = part in ("head", "lm_head") and any(
            state[name].shape != wanted[name].shape
            and state[name].shape[1:] == wanted[name].shape[1:]
            for name in ours & theirs
        )
        if ours and (not theirs or other):
            fresh |= ours
        if theirs and (not ours or other):
            left_out |= theirs
    left_out |= {
        name
        for name in state.keys() - wanted.keys()
        if SEGMENTATION.match(name) or name.startswith("cls_pt_layers.")
    }
    _check_norm_of_head(wanted, fresh)
    state = {name: tensor for name, tensor in state.items() if name not in left_out}
    compare_tensors(state, {n: t for n, t in wanted.items() if n not in fresh}, "the model")
    notes = weights.guesses
    if "norm_eps" in weights.stated and source.norm_eps != target.norm_eps:
        notes += (f"norm_eps is {source.norm_eps} in the source, {target.norm_eps} in the model",)
    return state, LoadReport(
        loaded=tuple(state),
        resized=resized,
        expanded=expanded,
        fresh=tuple(sorted(fresh)),
        left_out=tuple(sorted(left_out)),
        dropped=weights.dropped,
        notes=notes,
    )


def _resize(
    state: dict[str, Tensor], source: tuple[int, int], target: tuple[int, int]
) -> tuple[str, ...]:
    """Bring positions to the target's grid, in place; their names where that changed them."""
    if source == target:
        return ()
    names, done = [], {}  # blocks that share a table share the work
    for name, tensor in state.items():
        if name.endswith("relative_position_bias_table"):
            if id(tensor) not in done:
                done[id(tensor)] = resize_rel_pos_table(tensor, source, target)
            state[name] = done[id(tensor)]
            names.append(name)
        elif name == "pos_embed":
            state[name] = resize_pos_embed(tensor, source, target)
            names.append(name)
    return tuple(names)


def _check_norm_of_head(wanted: Mapping[str, Tensor], fresh: set[str]) -> None:
    for head, norms in (("head.weight", ("fc_norm", "norm")), ("lm_head.weight", ("norm",))):
        norm = next((f"{n}.weight" for n in norms if f"{n}.weight" in wanted), None)
        if head in wanted and head not in fresh and norm in fresh:
            raise ValueError(
                f"the source's {head} was trained behind another norm than {norm}, which it lacks: "
                "build the model with the source's global_pool"
            )


def _timm_lacks(name: str) -> bool:
    part = name.split(".")[0]
    return part in ("mask_token", "lm_head", "cls_pt_layers") or bool(SEGMENTATION.match(name))
