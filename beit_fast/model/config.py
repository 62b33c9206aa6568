"""What a BEiT is made of, and the sizes that have a name.

Two families. Vanilla BEiT, of the paper's main tables, is a plain ViT:
`use_abs_pos_emb`, no `init_values`. BEiT+, of appendices A and B and of nearly all published
weights, has LayerScale and a relative-position bias: one table shared by all blocks in
pre-training, one per block in fine-tuning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class BeitConfig:
    """Shape of the encoder and of its heads; the defaults are BEiT+ Base as it is pre-trained.

    Raises ValueError for combinations that make no model, saying what to change.
    """

    img_size: int | tuple[int, int] = 224  # pixels; (height, width) unless square
    patch_size: int | tuple[int, int] = 16
    # Images of any size that patches divide: positions are resized as they are used.
    dynamic_img_size: bool = False
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    attn_head_dim: int | None = None  # channels of a head; None: embed_dim / num_heads
    qkv_bias: bool = True  # of queries and values; keys never have one
    mlp_ratio: float = 4.0
    init_values: float | None = 0.1  # LayerScale at the start; None or 0: no LayerScale
    use_abs_pos_emb: bool = False
    use_rel_pos_bias: bool = False  # a table per block
    use_shared_rel_pos_bias: bool = True  # one table for all blocks; with both on, they add
    drop_path_rate: float = 0.0  # of the last block; grows linearly from 0 at the first
    # Keep round(B (1 - rate)) samples per branch, drawn without replacement, and compute no others.
    drop_path_compact: bool = False
    # Same function and parameters with less memory: vectors go into the weights at each step.
    fold_layer_scale: bool = False
    fold_norm_affine: bool = False
    # In the last block, after attention, compute only what a loss over listed patches reads.
    skip_unread_rows: bool = False
    norm_eps: float = 1e-6
    num_classes: int = 1000  # of the classifier; 0: no head, pooled features
    # Patches' mean then norm, norm then [CLS], or "": all tokens go to the head (timm's).
    global_pool: Literal["avg", "token", ""] = "avg"
    use_fc_norm: bool | None = None  # the norm after pooling and not before; None: with "avg"
    drop_rate: float = 0.0  # dropout before the classifier
    vocab_size: int = 8192
    predict: Literal["tokens", "pixels"] = "tokens"  # of hidden patches; pixels: Table 4's ablation

    def __post_init__(self) -> None:
        (height, width), (patch_height, patch_width) = self.image_pixels, self.patch_pixels
        if min(height, width, patch_height, patch_width) < 1:
            raise ValueError(f"img_size {self.img_size}, patch_size {self.patch_size}: pass >= 1")
        if height % patch_height or width % patch_width:
            fit = (
                max(1, round(height / patch_height)) * patch_height,
                max(1, round(width / patch_width)) * patch_width,
            )
            raise ValueError(
                f"{height}x{width} pixels do not divide into patches of "
                f"{patch_height}x{patch_width}: pass img_size={fit} or another patch_size"
            )
        for name in ("in_chans", "embed_dim", "depth", "num_heads", "attn_head_dim", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: pass at least 1")
        if self.attn_head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} does not divide into num_heads {self.num_heads}: "
                "change one of them or set attn_head_dim"
            )
        for name in ("drop_path_rate", "drop_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a rate in [0, 1)")
        if (self.init_values or 0) < 0 or self.num_classes < 0:
            raise ValueError(
                f"init_values {self.init_values}, num_classes {self.num_classes}: pass 0 for none"
            )
        if self.global_pool not in ("avg", "token", ""):
            raise ValueError(f"global_pool is {self.global_pool!r}: pass 'avg', 'token' or ''")
        if self.predict not in ("tokens", "pixels"):
            raise ValueError(f"predict is {self.predict!r}: pass 'tokens' or 'pixels'")

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
