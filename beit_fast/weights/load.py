"""Weights of unilm, timm, transformers and runs of ours into the models here.

    model = from_pretrained("microsoft/beit-base-patch16-224", img_size=384, num_classes=10)
    report = load_pretrained(model, "runs/small")

Whatever does not fit is an error that lists it, before anything is changed. What a task adds (a
head, its norm, the mask token) may be left out or stay fresh, and the report says so by name.
"""

import dataclasses
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig, SegmenterConfig
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table
from beit_fast.weights.layouts import SEGMENTATION, by_part, shorten
from beit_fast.weights.read import (
    MODEL_CLASSES,
    OWN_TABLE,
    SHARED_TABLE,
    Source,
    Weights,
    compare_tensors,
    read_checkpoint,
)

logger = logging.getLogger("beit_fast.model")

# What a task adds to the encoder: absent as a whole it stays fresh, unwanted it is left out.
_TASK_PARTS = (
    *("mask_token", "norm", "fc_norm", "head", "lm_head"),
    *("fpn1", "fpn2", "decode_head", "auxiliary_head"),
)
_CONV_SEG = re.compile(r"(decode_head|auxiliary_head)\.conv_seg\.")


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
                lines.append(f"{field_name.replace('_', ' ')}: {by_part(names)}")
        return "\n".join([*lines, *self.notes])


def load_pretrained(model: Beit, source: Source, *, key: str | None = None) -> LoadReport:
    """Load a checkpoint into `model`, whose config decides: positions are fitted to it.

    A shared table is copied to each block where the blocks have tables; tables and positions of
    another grid are resized (exactly as unilm does); a head with other classes stays fresh (of a
    segmenter's heads the last convolutions), and so does what the source's task does not have, with
    the values `model` has. dtype and device are the model's. Where the source does not say its
    heads they are the model's, and where its positions are as many as the model's grid has, that is
    their grid. `source` and `key`: as for `read_checkpoint`.
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
    checkpoint has 0 classes; a segmenter made of what is none needs it), `use_rel_pos_bias=True,
    use_shared_rel_pos_bias=False` a table for each block, as fine-tuning has. Where the checkpoint
    does not say its heads, `num_heads` does; where its positions are as many as the grid of
    `img_size` has, that is their grid. What is fresh, left out or guessed is logged as a warning;
    `load_pretrained` returns it.
    Raises as `read_checkpoint` and `load_pretrained` do.
    """
    weights = read_checkpoint(source, key=key, unless_stated=overrides)
    model_class = model_class or MODEL_CLASSES.get(weights.task, Beit)
    model = model_class(_config_for(model_class, weights.config, overrides))
    model.to(weights.state["cls_token"].dtype)
    report = load_pretrained(model, weights)
    if report.fresh or report.left_out or weights.guesses:
        logger.warning("%s", report)
    return model.eval()


def _config_for(
    model_class: type[Beit], config: BeitConfig, overrides: Mapping[str, Any]
) -> BeitConfig:
    """The checkpoint's config as one of this model's class, with fields replaced."""
    kind = model_class.config_class
    if isinstance(config, SegmenterConfig) == issubclass(kind, SegmenterConfig):
        return dataclasses.replace(config, **overrides)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(BeitConfig)}
    if issubclass(kind, SegmenterConfig):
        if "num_classes" not in overrides:
            raise ValueError(
                f"the checkpoint is of no segmenter, and {model_class.__name__} needs to know how "
                "many classes there are: pass num_classes"
            )
        del fields["drop_rate"]  # of another task's head
    return kind(**{**fields, **overrides})


def _unless_stated(config: BeitConfig) -> dict[str, Any]:
    return {"img_size": config.img_size, "num_heads": config.num_heads}


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
        other = (
            _other_rows(ours & theirs, state, wanted)
            if part in ("head", "lm_head")
            else _other_head(part, source, target)
        )
        if ours and (not theirs or other):
            fresh |= ours
        if theirs and (not ours or other):
            left_out |= theirs
    classes = {name for name in wanted.keys() & state.keys() - fresh if _CONV_SEG.match(name)}
    if _other_rows(classes, state, wanted):
        fresh |= classes
        left_out |= classes
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
    if isinstance(source, SegmenterConfig) and (taps := _taps_of(model)) not in (
        None,
        source.tapped,
    ):
        notes += (
            f"blocks {list(source.tapped)} are read in the source, {list(taps)} in the model: what "
            "was trained on the one is given the other",
        )
    return state, LoadReport(
        loaded=tuple(state),
        resized=resized,
        expanded=expanded,
        fresh=tuple(sorted(fresh)),
        left_out=tuple(sorted(left_out)),
        dropped=weights.dropped,
        notes=notes,
    )


def _other_rows(
    names: Collection[str], state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> bool:
    """Whether one of these tensors differs in how many rows it has, and in nothing else."""
    return any(
        state[name].shape != wanted[name].shape and state[name].shape[1:] == wanted[name].shape[1:]
        for name in names
    )


def _other_head(part: str, source: BeitConfig, target: BeitConfig) -> bool:
    """Whether this part of a segmenter is built otherwise in the other."""
    if not isinstance(source, SegmenterConfig) or not isinstance(target, SegmenterConfig):
        return False
    ours, theirs = (
        {
            "decode_head": (config.head, config.upernet_channels),
            "auxiliary_head": config.auxiliary_channels,
        }.get(part)
        for config in (source, target)
    )
    return ours != theirs


def _taps_of(model: Beit) -> tuple[int, ...] | None:
    if isinstance(model.config, SegmenterConfig):
        return model.config.tapped
    return getattr(model, "taps", None)


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
