"""What a BEiT and a segmenter are made of, and the sizes that have a name.

Two families. Vanilla BEiT, of the paper's main tables, is a plain ViT:
`use_abs_pos_emb`, no `init_values`. BEiT+, of appendices A and B and of nearly all published
weights, has LayerScale and a relative-position bias: one table shared by all blocks in
pre-training, one per block in fine-tuning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from beit_fast.checks import (
    LARGE,
    Count,
    FieldError,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Side,
    check_fields,
)


@dataclass(frozen=True, kw_only=True)
class BeitConfig:
    """Shape of the encoder and of its heads; the defaults are BEiT+ Base as it is pre-trained.

    Raises ValueError for combinations that make no model, saying what to change.
    """

    img_size: Side = 224  # pixels; (height, width) unless square
    patch_size: Side = 16
    # Images of any size that patches divide: positions are resized as they are used.
    dynamic_img_size: bool = False
    in_chans: Count = 3
    embed_dim: Count = 768
    depth: Count = 12
    num_heads: Count = 12
    attn_head_dim: Count | None = None  # channels of a head; None: embed_dim / num_heads
    qkv_bias: bool = True  # of queries and values; keys never have one
    mlp_ratio: Positive = 4.0
    init_values: NonNegative | None = 0.1  # LayerScale at the start; None or 0: no LayerScale
    use_abs_pos_emb: bool = False
    use_rel_pos_bias: bool = False  # a table per block
    use_shared_rel_pos_bias: bool = True  # one table for all blocks; with both on, they add
    drop_path_rate: Fraction = 0.0  # of the last block; grows linearly from 0 at the first
    # Keep round(B (1 - rate)) samples per branch, drawn without replacement, and compute no others.
    drop_path_compact: bool = False
    # In the last block, after attention, compute only what a loss over listed patches reads.
    skip_unread_rows: bool = False
    norm_eps: Positive = 1e-6
    num_classes: Natural = 1000  # of the classifier; 0: no head, pooled features
    # Patches' mean then norm, norm then [CLS], or "": all tokens go to the head (timm's).
    global_pool: Literal["avg", "token", ""] = "avg"
    use_fc_norm: bool | None = None  # the norm after pooling and not before; None: with "avg"
    drop_rate: Fraction = 0.0  # dropout before the classifier
    vocab_size: Count = 8192
    predict: Literal["tokens", "pixels"] = "tokens"  # of hidden patches; pixels: Table 4's ablation

    # Fields of earlier versions, with the value that holds now. Folding changed neither function
    # nor parameters, so that weights are read whatever these say.
    REMOVED: ClassVar[dict[str, Any]] = {"fold_layer_scale": False, "fold_norm_affine": False}

    def __post_init__(self) -> None:
        check_fields(self)
        (height, width), (patch_height, patch_width) = self.image_pixels, self.patch_pixels
        if height % patch_height or width % patch_width:
            fit = (
                max(1, round(height / patch_height)) * patch_height,
                max(1, round(width / patch_width)) * patch_width,
            )
            raise FieldError(
                "img_size",
                f"is {self.img_size}, and {height}x{width} pixels do not divide into patches of "
                f"{patch_height}x{patch_width}: pass img_size={fit} or another patch_size",
            )
        if self.attn_head_dim is None and self.embed_dim % self.num_heads:
            raise FieldError(
                "embed_dim",
                f"{self.embed_dim} does not divide into num_heads {self.num_heads}: change one of "
                "them or set attn_head_dim",
            )
        if self.embed_dim * self.mlp_ratio > LARGE:
            raise FieldError(
                "mlp_ratio",
                f"is {self.mlp_ratio}, with embed_dim {self.embed_dim} more channels than {LARGE}: "
                "give less",
            )
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise FieldError(
                "mlp_ratio",
                f"is {self.mlp_ratio}, which leaves an MLP no channel of embed_dim "
                f"{self.embed_dim}: give {1 / self.embed_dim:g} or more",
            )

    @property
    def norm_follows_pooling(self) -> bool:
        """Whether the classifier's norm is `fc_norm`."""
        return self.global_pool == "avg" if self.use_fc_norm is None else self.use_fc_norm

    @property
    def image_pixels(self) -> tuple[int, int]:
        """(height, width) of an image."""
        return _pair(self.img_size)

    @property
    def patch_pixels(self) -> tuple[int, int]:
        """(height, width) of a patch."""
        return _pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(Gh, Gw), patches down and across."""
        (height, width), (patch_height, patch_width) = self.image_pixels, self.patch_pixels
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """L = Gh Gw."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """Values in a patch, channels included."""
        return self.in_chans * self.patch_pixels[0] * self.patch_pixels[1]

    @property
    def head_dim(self) -> int:
        """K, channels of an attention head."""
        return self.attn_head_dim or self.embed_dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(BeitConfig):
    """Shape of a segmenter; the defaults are Base at 512 px with the 150 classes of ADE20K.

    Raises ValueError for combinations that make no model, saying what to change.
    """

    img_size: Side = 512
    use_rel_pos_bias: bool = True
    use_shared_rel_pos_bias: bool = False
    num_classes: Natural = 150  # 0: not known yet, as in a recipe for data of one's own
    drop_rate: Fraction = 0.1  # of whole channels before the last convolution, as mmsegmentation
    # UPerNet (arXiv:1807.10221) on four maps; or batch norm and one 1x1 convolution on one.
    head: Literal["upernet", "linear"] = "upernet"
    # Blocks that are read, from 0: four, one for each map, or one; None: see `tapped`.
    taps: tuple[Natural, ...] | None = None
    head_channels: Count | None = None  # of UPerNet; None: embed_dim
    auxiliary_channels: Natural = 256  # of UPerNet's second head, for training; 0: no such head

    def __post_init__(self) -> None:
        super().__post_init__()
        is_linear = self.head == "linear"
        if self.num_classes == 1:
            raise FieldError(
                "num_classes",
                "is 1: give 2 or more, what is of no other class counts as one",
            )
        needed = 1 if is_linear else 4
        if self.taps is not None and (
            len(self.taps) != needed or any(tap >= self.depth for tap in self.taps)
        ):
            raise FieldError(
                "taps",
                f"are {list(self.taps)}: the {self.head} head reads {needed}, give {needed} of "
                f"the blocks 0 to {self.depth - 1}",
            )
        if is_linear and self.head_channels is not None:
            raise FieldError(
                "head_channels",
                f"is {self.head_channels}, and the linear head has none of its own: leave it out",
            )
        pooled = 4 if self.patch_pixels == (8, 8) else 2
        if not is_linear and min(self.grid) < pooled:
            raise FieldError(
                "img_size",
                f"is {self.img_size}, {self.grid[0]}x{self.grid[1]} patches, of which UPerNet "
                f"pools {pooled}x{pooled}: give {pooled} or more patches down and across",
            )

    @property
    def tapped(self) -> tuple[int, ...]:
        """Blocks that are read, from 0: `taps`, or `default_taps`, or for "linear" the last."""
        if self.taps is not None:
            return tuple(self.taps)
        return (self.depth - 1,) if self.head == "linear" else default_taps(self.depth)

    @property
    def upernet_channels(self) -> int:
        """Of UPerNet's convolutions."""
        return self.head_channels or self.embed_dim


def default_taps(depth: int) -> tuple[int, int, int, int]:
    """Blocks that end a third, a half, two thirds and the whole of the depth, from 0.

    3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24: unilm's.
    """
    ends = (depth // 3, depth // 2, 2 * depth // 3, depth)
    return tuple(max(end - 1, 0) for end in ends)


def beit_config(name: str, **overrides: Any) -> BeitConfig:
    """The variant called `name`, one of VARIANTS, with fields replaced.

    `beit_<size>_patch16_<pixels>` is BEiT+ for fine-tuning (a table per block), `..._8k_vocab` as
    it is pre-trained (a shared table; unilm's name), `..._vanilla` the paper's plain ViT.
    Raises ValueError for an unknown name.

    >>> beit_config("beit_base_patch16_224_8k_vocab", drop_path_rate=0.1).grid
    (14, 14)
    """
    if name not in VARIANTS:
        raise ValueError(f"no variant {name!r}: pass one of {', '.join(VARIANTS)}")
    return BeitConfig(**{**VARIANTS[name], **overrides})


# Base and Large: paper 2.6 and unilm's scripts (LayerScale by depth). Small: as DeiT's,
# arXiv:2012.12877, Table 1.
_SIZES = {
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "init_values": 0.1},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "init_values": 0.1},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5},
}
_POSITIONS = {
    "": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False},
    "_8k_vocab": {"use_shared_rel_pos_bias": True},
    "_vanilla": {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False, "init_values": None},
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"beit_{size}_patch16_{pixels}{suffix}": {"img_size": pixels, **widths, **positions}
    for size, widths in _SIZES.items()
    for pixels in (224, 384, 512)
    for suffix, positions in _POSITIONS.items()
}


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width
