"""The names BEiT's tensors have elsewhere: one table, a column for each layout, read both ways.

House names are unilm's and timm's. transformers has two sets: that of its files, which version 4
had in its modules too and version 5 still writes, and that of version 5's modules. There queries,
keys and values are three matrices. Held against timm and transformers in
tests/weights/test_layouts.py.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from beit_fast.model.config import BeitConfig

Layout = Literal["house", "hf4", "hf5"]
LAYOUTS: tuple[Layout, ...] = ("house", "hf4", "hf5")

# {i}, {k}: numbers. *: weight and bias. @: what a batch norm has. =: as in the column before.
_FILE, _MODULE = "beit.encoder.layer.{i}.", "beit.layers.{i}."
_TABLE = "relative_position_bias_table"
_ROWS = (
    ("cls_token", "beit.embeddings.cls_token", "="),
    ("mask_token", "beit.embeddings.mask_token", "="),
    ("pos_embed", "beit.embeddings.position_embeddings", "="),
    ("patch_embed.proj.*", "beit.embeddings.patch_embeddings.projection.*", "="),
    (
        f"rel_pos_bias.{_TABLE}",
        f"beit.encoder.relative_position_bias.{_TABLE}",
        f"beit.shared_position_bias.{_TABLE}",
    ),
    ("fc_norm.*", "beit.pooler.layernorm.*", "="),
    ("head.*", "classifier.*", "="),
    ("lm_head.*", "lm_head.*", "="),
    *(
        (f"blocks.{{i}}.{house}", _FILE + file, _MODULE + module)
        for house, file, module in (
            ("norm1.*", "layernorm_before.*", "layernorm_before.*"),
            ("attn.q.weight", "attention.attention.query.weight", "attention.q_proj.weight"),
            ("attn.k.weight", "attention.attention.key.weight", "attention.k_proj.weight"),
            ("attn.v.weight", "attention.attention.value.weight", "attention.v_proj.weight"),
            ("attn.q_bias", "attention.attention.query.bias", "attention.q_proj.bias"),
            ("attn.v_bias", "attention.attention.value.bias", "attention.v_proj.bias"),
            (
                f"attn.{_TABLE}",
                f"attention.attention.relative_position_bias.{_TABLE}",
                f"relative_position_bias.{_TABLE}",
            ),
            ("attn.proj.*", "attention.output.dense.*", "attention.o_proj.*"),
            ("gamma_1", "lambda_1", "lambda_1"),
            ("gamma_2", "lambda_2", "lambda_2"),
            ("norm2.*", "layernorm_after.*", "layernorm_after.*"),
            ("mlp.fc1.*", "intermediate.dense.*", "mlp.fc1.*"),
            ("mlp.fc2.*", "output.dense.*", "mlp.fc2.*"),
        )
    ),
    # Segmentation. House: unilm's without "backbone."; of the linear head see _WHOLE.
    ("fpn1.0.*", "fpn1.0.*", "fpn.fpn1.conv_transpose1.*"),
    ("fpn1.1.@", "fpn1.1.@", "fpn.fpn1.normalization.@"),
    ("fpn1.3.*", "fpn1.3.*", "fpn.fpn1.conv_transpose2.*"),
    ("fpn2.0.*", "fpn2.0.*", "fpn.fpn2.*"),
    ("decode_head.conv_seg.*", "decode_head.classifier.*", "="),
    ("auxiliary_head.conv_seg.*", "auxiliary_head.classifier.*", "="),
    *(
        (f"{house}.{part}", f"{house}.{part}", f"{module}.{name}")
        for house, module in (
            ("decode_head.psp_modules.{k}.1", "decode_head.psp_modules.blocks.{k}.conv"),
            ("decode_head.bottleneck", "decode_head.psp_bottleneck"),
            ("decode_head.lateral_convs.{k}", "decode_head.lateral_convs.{k}"),
            ("decode_head.fpn_convs.{k}", "decode_head.fpn_convs.{k}"),
            ("decode_head.fpn_bottleneck", "decode_head.fpn_bottleneck"),
            ("auxiliary_head.convs.{k}", "auxiliary_head.convs.{k}"),
        )
        for part, name in (("conv.weight", "convolution.weight"), ("bn.@", "normalization.@"))
    ),
)
# The last norm has two homes in transformers: the encoder's, and the one before lm_head.
_NORM, _MIM_NORM = ("norm.*", "beit.layernorm.*", "="), ("norm.*", "layernorm.*", "=")
_ENDINGS = {
    "*": ("weight", "bias"),
    "@": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
}

SEGMENTATION = re.compile(r"(fpn[1-4]|decode_head|auxiliary_head)\.")
_INDEX = re.compile(r"(^|\.)relative_position_index$")
_PROJECTION = re.compile(r"(blocks\.\d+\.attn\.)([qkv])\.weight")
# As they are in house names: split apart for others; BEiT v2's blocks of pre-training only, and the
# batch norm of the linear head, which no other layout has.
_WHOLE = re.compile(
    r"blocks\.\d+\.attn\.qkv\.weight|cls_pt_layers\.\d+\..*"
    rf"|decode_head\.bn\.({'|'.join(_ENDINGS['@'])})"
)
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def find_layout(names: Iterable[str]) -> Layout:
    """Whose names these are, with whatever prefix. Raises ValueError where nobody's."""
    names = list(names)
    for layout, pattern in (
        ("hf4", r"(^|\.)encoder\.layer\.\d+\."),
        ("hf5", r"(^|\.)layers\.\d+\.(attention\.|layernorm_)"),
        ("house", r"(^|\.)blocks\.\d+\.(attn\.|norm1\.)"),
    ):
        if any(re.search(pattern, name) for name in names):
            return layout
    raise ValueError(
        f"these {len(names)} tensors are no BEiT's ({shorten(sorted(names))}): pass weights with "
        "unilm's, timm's or transformers' names, `blocks.0. ...` or `encoder.layer.0. ...`"
    )


def to_house(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under house names, and the names of the index buffers that were dropped.

    Prefixes of wrappers (`module.`, `_orig_mod.`, `model.`, `backbone.`) and transformers' `beit.`
    may be there or not. Values are not touched, but for query, key and value, which are joined.
    Raises ValueError that lists names that the layout does not have.
    """
    layout = find_layout(state)
    dropped = tuple(sorted(name for name in state if _INDEX.search(name)))
    stripped = _strip([name for name in state if not _INDEX.search(name)], layout)
    is_mim = any(name.startswith("lm_head.") for name, _ in stripped)
    rename = _translation(layout, "house", is_mim)
    house: dict[str, Tensor] = {}
    unknown, twice = [], []
    for name, original in stripped:
        if _WHOLE.fullmatch(name):
            new = name
        elif (new := rename(name)) is None or (layout == "house" and _PROJECTION.fullmatch(name)):
            unknown.append(original)
            continue
        if new in house:
            twice.append(f"{original} -> {new}")
        house[new] = state[original]
    if unknown:
        raise ValueError(
            f"{len(unknown)} names that no BEiT has: {shorten(sorted(unknown))}; take them out of "
            "the file if they are not part of the model"
        )
    if twice:
        raise ValueError(f"two tensors for one place: {shorten(sorted(twice))}: remove one")
    return _join_projections(house), dropped


def from_house(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Tensors with house names under those of `layout`. Raises ValueError for other names."""
    if layout == "house":
        return dict(state)
    is_mim = _starts(state, "lm_head.")
    rename, renamed, unknown = _translation("house", layout, is_mim), {}, []
    for name, tensor in _split_projections(state).items():
        new = rename(name)
        if new is None:
            unknown.append(name)
        else:
            renamed[new] = tensor
    if unknown:
        raise ValueError(f"{layout} has no name for {shorten(sorted(unknown))}: leave them out")
    return renamed


def with_zero_biases(state: Mapping[str, Tensor], config: BeitConfig) -> dict[str, Tensor]:
    """For transformers, which has no BEiT without them: the biases of queries and values, zero."""
    if config.qkv_bias:
        return dict(state)
    whole = {}
    for name, tensor in state.items():
        if name.endswith(".attn.qkv.weight"):
            stem = name.removesuffix("qkv.weight")
            whole |= {f"{stem}{part}_bias": tensor.new_zeros(len(tensor) // 3) for part in "qv"}
        whole[name] = tensor
    return whole


def shorten(names: list[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def by_part(names: Iterable[str], most: int = 4) -> str:
    """All names, sorted; of a part that has more than `most` how many there are.

    >>> by_part(["norm.bias", *(f"fpn1.{layer}.bias" for layer in range(5))])
    'fpn1.* (5 tensors), norm.bias'
    """
    parts: dict[str, list[str]] = {}
    for name in sorted(names):
        parts.setdefault(name.partition(".")[0], []).append(name)
    told = (
        ", ".join(inside) if len(inside) <= most else f"{part}.* ({len(inside)} tensors)"
        for part, inside in parts.items()
    )
    return ", ".join(told)


def _starts(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _translation(source: Layout, target: Layout, is_mim: bool):
    """A function from a name to its translation, None where there is none."""
    exact, numbered = {}, {}
    for row in (*_ROWS, _MIM_NORM if is_mim else _NORM):
        row = [row[0], row[1], row[1] if row[2] == "=" else row[2]]
        theirs, ours = row[LAYOUTS.index(source)], row[LAYOUTS.index(target)]
        for ending in _ENDINGS.get(theirs[-1], ("",)):
            old, new = theirs.rstrip("*@") + ending, ours.rstrip("*@") + ending
            numbers = re.compile(r"\{[ik]\}")
            (numbered if numbers.search(old) else exact)[numbers.sub("{}", old)] = numbers.sub(
                "{}", new
            )

    def rename(name: str) -> str | None:
        if name in exact:
            return exact[name]
        # The number of a block or a convolution is the first one that the table marks.
        for match in re.finditer(r"(?<=\.)(0|[1-9]\d{0,3})(?=\.)", name):
            new = numbered.get(f"{name[: match.start()]}{{}}{name[match.end() :]}")
            if new is not None:
                return new.format(match[0])
        return None

    return rename


def _strip(originals: list[str], layout: Layout) -> list[tuple[str, str]]:
    """Each name without prefixes, and as it was."""
    names, wrapper = list(originals), ""
    while wrapper is not None:
        names = [name.removeprefix(wrapper) for name in names]
        wrapper = next(
            (w for w in _WRAPPERS if names and all(n.startswith(w) for n in names)), None
        )
    if layout == "house":
        names = [name.removeprefix("backbone.") for name in names]
    elif not _starts(names, "beit.embeddings."):
        # BeitModel's and BeitBackbone's own files do without "beit.".
        encoder = re.compile(r"(embeddings|encoder|layers|layernorm|pooler|shared_position_bias)\.")
        names = [f"beit.{name}" if encoder.match(name) else name for name in names]
    return list(zip(names, originals, strict=True))


def _join_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _PROJECTION.fullmatch(name)
        if match is None:
            joined[name] = tensor
            continue
        whole = f"{match[1]}qkv.weight"
        if whole in joined:
            continue
        parts = [state.get(f"{match[1]}{part}.weight") for part in "qkv"]
        missing = [part for part, t in zip("qkv", parts, strict=True) if t is None]
        if missing:
            raise ValueError(f"{match[1]}{{q,k,v}}: the weight of {', '.join(missing)} is missing")
        if len({(part.shape, part.dtype) for part in parts}) > 1 or parts[0].ndim != 2:
            shapes = [f"{tuple(part.shape)} {part.dtype}" for part in parts]
            raise ValueError(f"{match[1]}{{q,k,v}} are {shapes}: matrices of one shape are needed")
        joined[whole] = torch.cat(parts)
    return joined


def _split_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    split = {}
    for name, tensor in state.items():
        if not name.endswith(".attn.qkv.weight"):
            split[name] = tensor
            continue
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            split[f"{name.removesuffix('qkv.weight')}{part}.weight"] = rows
    return split
