"""The parts of a BEiT block (pre-norm), parameters under timm's names.

x = x + keep_1 gamma_1 Attention(LN(x));  x = x + keep_2 gamma_2 Mlp(LN(x))
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.kernels._triton import TRITON_DTYPES
from beit_fast.kernels.attention import attention_qkvpacked, rel_pos_attention_qkvpacked
from beit_fast.kernels.drop_path import KeptSamples, draw_kept_samples, num_kept
from beit_fast.kernels.gather_rows import gather_rows
from beit_fast.kernels.linear import linear
from beit_fast.kernels.rel_pos_bias import rel_pos_bias, relative_position_rows
from beit_fast.kernels.scale_residual import layer_norm, scale_residual, scale_residual_norm
from beit_fast.model.config import BeitConfig
from beit_fast.model.resize import resize_rel_pos_table


def patchify(images: Tensor, patch_pixels: tuple[int, int]) -> Tensor:
    """Images (B, C, height, width) cut into row-major patches: (B, L, C * patch area).

    Within a patch the order is that of a convolution's weight: channel, row, column.
    """
    height, width = patch_pixels
    blocks = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # B C Gh height Gw width
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class Linear(nn.Linear):
    """torch's layer, computed by `kernels.linear`; hooks, isinstance and names stay torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class PatchEmbed(nn.Module):
    """Linear projection of patches (paper 2.1): (B, C, height, width) -> (B, L, D).

    A convolution whose kernel is its stride, kept as one for its parameters, computed as the
    matrix product it is: 10.8 ms against 12.3 (channels-last images: 14.3) forward and backward at
    B2-224 for Base, one core. Images that are patches already, (B, L, P), stay as they are.
    Raises ValueError for images of another size than the model's, or with `dynamic_img_size` of one
    that patches do not divide, and for another dtype (under autocast any of 16 or 32 bits will do).
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.set_input_size(config)
        self.patch_pixels = config.patch_pixels
        self.dynamic_img_size = config.dynamic_img_size
        self.proj = nn.Conv2d(
            config.in_chans, config.embed_dim, config.patch_pixels, stride=config.patch_pixels
        )

    def set_input_size(self, config: BeitConfig) -> None:
        """Take images of the size of this configuration."""
        self.image_shape = (config.in_chans, *config.image_pixels)
        self.patches_shape = (config.num_patches, config.patch_dim)

    def forward(self, images: Tensor) -> Tensor:
        self._check_dtype(images)
        return linear(self.patches(images), self.proj.weight.flatten(1), self.proj.bias)

    def patches(self, images: Tensor) -> Tensor:
        """(B, L, P), cut from images or as they came."""
        if tuple(images.shape[1:]) == self.patches_shape:
            return images
        self._check(images)
        return patchify(images, self.patch_pixels)

    def grid_of(self, images: Tensor) -> tuple[int, int] | None:
        """(Gh, Gw) of images that `patches` takes; None: the model's own."""
        if images.ndim != 4 or tuple(images.shape[2:]) == self.image_shape[1:]:
            return None
        (height, width), (patch_height, patch_width) = images.shape[2:], self.patch_pixels
        return height // patch_height, width // patch_width

    def _check_dtype(self, images: Tensor) -> None:
        weight = self.proj.weight.dtype
        if images.dtype == weight:
            return
        device = images.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        if autocast and images.dtype in TRITON_DTYPES and weight in TRITON_DTYPES:
            return
        if images.is_floating_point():
            remedy = (
                f"pass images.to({weight}), or run under torch.autocast, which takes float32, "
                "bfloat16 and float16"
            )
        else:
            remedy = (
                "pass normalised floats, (images.float() / 255 - mean) / std, or patches made by "
                "beit_fast.kernels.patches.normalized_patches"
            )
        raise ValueError(f"the images are {images.dtype}, the model is {weight}: {remedy}")

    def _check(self, images: Tensor) -> None:
        channels, height, width = self.image_shape
        num_patches, patch_dim = self.patches_shape
        if not self.dynamic_img_size:
            if images.ndim == 4 and tuple(images.shape[1:]) == self.image_shape:
                return
            raise ValueError(
                f"the images are {tuple(images.shape)}, the model takes (B, {channels}, {height}, "
                f"{width}): resize the images, or build the model with dynamic_img_size=True, or "
                "with another img_size and positions resized by beit_fast.model.resize; patches "
                f"are (B, {num_patches}, {patch_dim})"
            )
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"the images are {tuple(images.shape)}, the model takes (B, {channels}, height, "
                f"width); patches are (B, {num_patches}, {patch_dim}), for those of another grid "
                "do not tell it: pass images"
            )
        (height, width), (patch_height, patch_width) = images.shape[2:], self.patch_pixels
        if height % patch_height or width % patch_width or not height or not width:
            raise ValueError(
                f"{height}x{width} pixels do not divide into patches of "
                f"{patch_height}x{patch_width}: pad or crop the images to multiples (nothing is "
                "padded here: pixels that are not there would be attended to)"
            )


class RelativePositionBias(nn.Module):
    """The table that all blocks share, as a dense bias (H, N, N): their gradients of it add up."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.relative_position_bias_table = _table(config)

    def forward(self, grid: tuple[int, int] | None = None) -> Tensor:
        """Of another grid's patches where one is given."""
        return rel_pos_bias(*_on_grid(self.relative_position_bias_table, self.grid, grid))


class Attention(nn.Module):
    """Self-attention, biased by the block's own table where it has one plus the shared bias.

    Queries and values have a trained bias, keys a hard zero: softmax would not see it. With
    `config.qkv_bias` False none has one.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.grid = config.grid
        width = config.num_heads * config.head_dim
        self.qkv = Linear(config.embed_dim, 3 * width, bias=False)
        biased = config.qkv_bias
        self.q_bias = nn.Parameter(torch.zeros(width)) if biased else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if biased else None
        self.register_buffer("k_bias", torch.zeros(width) if biased else None, persistent=False)
        self.relative_position_bias_table = _table(config) if config.use_rel_pos_bias else None
        self.proj = Linear(width, config.embed_dim)

    def forward(
        self,
        x: Tensor,
        shared_bias: Tensor | None,
        rows: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """x (B, N, D); shared_bias (H, N, N) or None; rows (I,) as of `select_rows`, or None.

        grid (Gh, Gw) of the patches in x; None: the model's own.
        """
        qkv_bias = self.qkv_bias()
        if is_plain(self.qkv, Linear):
            qkv_BND3 = linear(x, self.qkv.weight, qkv_bias)
        else:  # hooked, or another layer in its place
            qkv_BND3 = self.qkv(x) if qkv_bias is None else self.qkv(x) + qkv_bias
        qkv_BN3HK = qkv_BND3.unflatten(2, (3, self.num_heads, -1))
        table = self.relative_position_bias_table
        if table is None:
            out_BNHK = attention_qkvpacked(qkv_BN3HK, shared_bias)
        else:
            table, grid = _on_grid(table, self.grid, grid)
            if shared_bias is None:
                out_BNHK = rel_pos_attention_qkvpacked(qkv_BN3HK, table, grid)
            else:
                out_BNHK = attention_qkvpacked(qkv_BN3HK, rel_pos_bias(table, grid) + shared_bias)
        return self.proj(select_rows(out_BNHK.flatten(2), rows))

    def qkv_bias(self) -> Tensor | None:
        """That of queries, keys and values, (3 H K,), or None."""
        if self.q_bias is None:
            return None
        # 3 us of 45 ms at B2-N197-D768: a packed bias would save nothing, and cost its own names.
        return torch.cat((self.q_bias, self.k_bias, self.v_bias))


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), the exact (erf) GELU."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        hidden_dim = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = Linear(config.embed_dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(NamedTuple):
    """Which samples skip a branch: neither field set, none does."""

    keep: Tensor | None = None  # (B,): 0 or 1 / (1 - p)
    kept: KeptSamples | None = None  # a fixed number; the branch does not see the others

    def of_rows(self, rows: Tensor, x: Tensor) -> "DropPath":
        """The same for listed rows of x (B, N, D), as if each were a sample: by factor."""
        keep_B = self.keep
        if self.kept is not None:
            precise = torch.promote_types(x.dtype, torch.float32)
            keep_B = (self.kept.slots >= 0).to(precise) * self.kept.scale
        if keep_B is None:
            return self
        # -1 // N is -1: padding stays padding, and what is out of range shows as it does in x.
        return DropPath(keep=gather_rows(keep_B[:, None, None], rows // x.shape[1]).flatten())

    def rows_of_branch(self, rows: Tensor, x: Tensor) -> Tensor:
        """Where those rows are in a branch, which has the kept samples alone; -1: nowhere."""
        if self.kept is None:
            return rows
        N = x.shape[1]
        sample = (rows // N).clamp(0, len(x) - 1)
        slot = self.kept.slots.index_select(0, sample)
        return torch.where((rows >= 0) & (slot >= 0), slot * N + rows % N, -1)


class Block(nn.Module):
    """Attention and MLP, each a residual branch with LayerScale and its own draw of drop path.

    A residual and the norm after it are one pass over memory. `forward` ends with a residual;
    `step` goes on to the norm of the block that follows.
    """

    def __init__(self, config: BeitConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.config = config
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.gamma_1 = self.gamma_2 = None
        if config.init_values:
            self.gamma_1 = nn.Parameter(torch.full((config.embed_dim,), config.init_values))
            self.gamma_2 = nn.Parameter(torch.full((config.embed_dim,), config.init_values))

    def forward(
        self,
        x: Tensor,
        shared_bias: Tensor | None,
        rows: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """x (B, N, D) -> (B, N, D); other arguments as of `Attention`."""
        return self.step(x, self.enter(x), shared_bias, rows=rows, grid=grid)[0]

    def enter(self, x: Tensor) -> tuple[Tensor, DropPath]:
        """What attention sees of x, and which samples skip it."""
        path = self._draw_path(x)
        return self._normalize(x, self.norm1, path), path

    def step(
        self,
        x: Tensor,
        entered: tuple[Tensor, DropPath],
        shared_bias: Tensor | None,
        following: "Block | None" = None,
        rows: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, DropPath] | None]:
        """`forward`, with what `enter` gave; also what enters the block that follows."""
        ln, path = entered
        branch_rows = None if rows is None else path.rows_of_branch(rows, x)
        branch = self.attn(*_without_defaults(ln, shared_bias, branch_rows, grid))
        mlp_path = self._draw_path(x)
        if rows is not None:
            path, mlp_path = path.of_rows(rows, x), mlp_path.of_rows(rows, x)
            x = select_rows(x, rows)
        x, ln = self._add(x, branch, self.gamma_1, path, self.norm2, mlp_path)
        branch = self.mlp(ln)
        if following is None:
            return self._add(x, branch, self.gamma_2, mlp_path)[0], None
        path = following._draw_path(x)
        x, ln = self._add(x, branch, self.gamma_2, mlp_path, following.norm1, path)
        return x, (ln, path)

    def _add(
        self,
        x: Tensor,
        branch: Tensor,
        gamma: Tensor | None,
        path: DropPath,
        norm: nn.Module | None = None,
        norm_path: DropPath | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x with the branch added, and the norm of it for the branch of `norm_path`."""
        if norm is None or not is_plain(norm, nn.LayerNorm):
            x = scale_residual(x, branch, gamma, path.keep, kept=path.kept)
            return x, None if norm is None else self._normalize(x, norm, norm_path)
        return scale_residual_norm(
            x,
            branch,
            norm.weight,
            norm.bias,
            gamma,
            path.keep,
            kept=path.kept,
            eps=norm.eps,
            norm_kept=norm_path.kept,
        )

    def _normalize(self, x: Tensor, norm: nn.Module, path: DropPath) -> Tensor:
        if is_plain(norm, nn.LayerNorm):
            return layer_norm(x, norm.weight, norm.bias, eps=norm.eps, kept=path.kept)
        return norm(x if path.kept is None else x.index_select(0, path.kept.samples))

    def _draw_path(self, x: Tensor) -> DropPath:
        if not self.training or self.drop_path_rate == 0:
            return DropPath()
        if not self.config.drop_path_compact:
            return DropPath(keep=self._draw_keep(x))
        if num_kept(len(x), self.drop_path_rate) == len(x):
            return DropPath()
        return DropPath(kept=draw_kept_samples(len(x), self.drop_path_rate, x.device))

    def _draw_keep(self, x: Tensor) -> Tensor:
        """Per sample 0 or 1 / (1 - p), from torch's default generator, as timm draws."""
        keep_rate = 1 - self.drop_path_rate
        keep_B = torch.empty(x.shape[0], device=x.device)
        return keep_B.bernoulli_(keep_rate).div_(keep_rate)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    shared_bias: Tensor | None,
    rows: Tensor | None = None,
    *,
    grid: tuple[int, int] | None = None,
    tap: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Blocks one after another, each one's last residual in one pass with the next one's norm.

    The last one computes `rows` alone, see `select_rows`; it must be `rowwise_after_attention`.
    grid (Gh, Gw) of the patches in x; None: the model's own. `tap` is called with what each block
    gives. A block that is hooked, compiled or replaced is called as the module it is.
    """
    tap = tap or _ignore
    blocks = list(blocks)
    entered = None
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        listed = rows if following is None else None
        if not is_plain(block, Block):
            x = block(*_without_defaults(x, shared_bias, listed, grid))
            tap(x)
            continue
        if following is not None and not is_plain(following, Block):
            following = None
        entered = block.enter(x) if entered is None else entered
        x, entered = block.step(x, entered, shared_bias, following, listed, grid)
        tap(x)
    return x


def _ignore(_: Tensor) -> None:
    pass


def _without_defaults(
    x: Tensor, shared_bias: Tensor | None, rows: Tensor | None, grid: tuple[int, int] | None
) -> tuple:
    """Arguments of a block or an attention, short where a replaced one need not know the rest."""
    if grid is not None:
        return x, shared_bias, rows, grid
    return (x, shared_bias) if rows is None else (x, shared_bias, rows)


def select_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Row b N + n of x (B, N, D) for each of `rows` (I,), as a sample of one token: (I, 1, D).

    -1 gives zeros, whose gradient goes nowhere. Without rows x itself.
    """
    return x if rows is None else gather_rows(x, rows)[:, None]


def rowwise_after_attention(block: nn.Module) -> bool:
    """Whether what follows attention sees one token at a time, and no one watches it."""
    return (
        is_plain(block, Block)
        and is_plain(block.attn, Attention)
        and is_plain(block.mlp, Mlp)
        and all(is_plain(module, type(module)) for module in block.modules())
    )


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether calling this module is its class's `forward` and no more: no hook, no wrapper."""
    return (
        type(module) is kind
        and module._compiled_call_impl is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def _table(config: BeitConfig) -> nn.Parameter:
    return nn.Parameter(torch.zeros(relative_position_rows(config.grid), config.num_heads))


def _on_grid(
    table: Tensor, own: tuple[int, int], grid: tuple[int, int] | None
) -> tuple[Tensor, tuple[int, int]]:
    """The table of a grid of patches, and that grid; None: as they are."""
    return (table, own) if grid is None else (resize_rel_pos_table(table, own, grid), grid)
