"""Blocks in fewer passes over memory: what `layers.Block` says, as models run it.

- A residual and the norm after it are one pass, from the end of a block into the next one too.
- A last block of which a loss reads listed rows computes no others after its attention.
- With `config.drop_path_compact` a fixed number of samples skips a branch, uncomputed.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit_fast.kernels.head.gather_rows import gather_rows
from beit_fast.kernels.residual import layer_norm, scale_residual, scale_residual_norm
from beit_fast.kernels.residual.drop_path import KeptSamples, draw_kept_samples, num_kept
from beit_fast.model.config import BeitConfig
from beit_fast.model.layers import Attention, Block, Mlp, is_plain

ATTENTION, MLP = 0, 1  # rows of a block's keep


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


class FusedBlock(Block):
    """`Block`, equal but for rounding; its random draws, too, unless drop path is compact.

    `forward` ends with a residual; `step` goes on to the norm of the block that follows.
    """

    def __init__(self, config: BeitConfig, drop_path_rate: float) -> None:
        super().__init__(config, drop_path_rate)
        self.drop_path_compact = config.drop_path_compact

    def forward(
        self,
        x: Tensor,
        shared_bias: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        rows: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """`Block.forward`; with rows (I,) those alone, (I, 1, D) as `select_rows` gives them.

        For rows the block must be `rowwise_after_attention`; what stands for -1 means nothing.
        """
        return self.step(x, self.enter(x, keep), shared_bias, grid, rows, keep)[0]

    def enter(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, DropPath]:
        """What attention sees of x, and which samples skip it."""
        path = self._path(x, keep, ATTENTION)
        return _norm(x, self.norm1, path), path

    def step(
        self,
        x: Tensor,
        entered: tuple[Tensor, DropPath],
        shared_bias: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        rows: Tensor | None = None,
        keep: Tensor | None = None,
        following: "FusedBlock | None" = None,
        following_keep: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, DropPath] | None]:
        """`forward`, with what `enter` gave; also what enters the block that follows."""
        ln, path = entered
        if rows is None:
            branch = self.attn(ln, shared_bias, **_known(grid=grid))
        else:
            mixed = self.attn.mix(ln, shared_bias, grid)
            branch = self.attn.proj(select_rows(mixed, path.rows_of_branch(rows, x)))
        mlp_path = self._path(x, keep, MLP)
        if rows is not None:
            path, mlp_path = path.of_rows(rows, x), mlp_path.of_rows(rows, x)
            x = select_rows(x, rows)
        x, ln = _add_and_norm(x, branch, self.gamma_1, path, self.norm2, mlp_path)
        branch = self.mlp(ln)
        if following is None:
            return _add(x, branch, self.gamma_2, mlp_path), None
        path = following._path(x, following_keep, ATTENTION)
        x, ln = _add_and_norm(x, branch, self.gamma_2, mlp_path, following.norm1, path)
        return x, (ln, path)

    def _path(self, x: Tensor, keep: Tensor | None, branch: int) -> DropPath:
        """Which samples skip a branch: as keep (2, B) says, or drawn now."""
        if not self.drop_path_compact:
            return DropPath(self.given_or_drawn(None if keep is None else keep[branch], x))
        rate = self.drop_path_rate
        if not self.training or num_kept(len(x), rate) == len(x):
            return DropPath()
        return DropPath(kept=draw_kept_samples(len(x), rate, x.device))


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    shared_bias: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    rows: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    tap: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Blocks one after another, each one's last residual in one pass with the next one's norm.

    The last one computes `rows` alone, see `select_rows`; it must be `rowwise_after_attention`.
    grid (Gh, Gw) of the patches in x; None: the model's own. keep (2 blocks or more, B): of each
    branch what a block would draw for drop path, attention's before the MLP's; None: they draw.
    `tap` is called with what each block gives. A block that is hooked, compiled or replaced is
    called as the module it is.
    """
    blocks = list(blocks)
    entered = None
    keeps = [None if keep is None else keep[2 * i : 2 * i + 2] for i in range(len(blocks))]
    rest = zip([*blocks[1:], None], [*keeps[1:], None], strict=True)
    for block, own, (following, next_keep) in zip(blocks, keeps, rest, strict=True):
        listed = rows if following is None else None
        if is_plain(block, FusedBlock):
            if following is not None and not is_plain(following, FusedBlock):
                following = None
            entered = block.enter(x, own) if entered is None else entered
            more = own, following, next_keep
            x, entered = block.step(x, entered, shared_bias, grid, listed, *more)
        else:
            x = block(x, shared_bias, **_known(grid=grid, rows=listed, keep=own))
        if tap is not None:
            tap(x)
    return x


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Row b N + n of x (B, N, D) for each of `rows` (I,), as a sample of one token: (I, 1, D).

    -1 gives zeros, whose gradient goes nowhere.
    """
    return gather_rows(x, rows)[:, None]


def rowwise_after_attention(block: nn.Module) -> bool:
    """Whether what follows attention sees one token at a time, and no one watches it."""
    return (
        (is_plain(block, FusedBlock) or _is_sharded(block))
        and is_plain(block.attn, Attention)
        and is_plain(block.mlp, Mlp)
        and all(is_plain(m, type(m)) for m in block.modules() if m is not block)
    )


def _is_sharded(block: nn.Module) -> bool:
    """Whether it is a block whose weights torch's FSDP puts together, hooked by nobody else: FSDP
    makes a class of its own of it, and looks at nothing that goes in or out."""
    if type(block) is FusedBlock or not isinstance(block, FusedBlock):
        return False
    hooks = (block._forward_pre_hooks, block._forward_hooks)
    return type(block).forward is FusedBlock.forward and all(
        hook.__module__.startswith("torch.distributed.fsdp.")
        for hooked in hooks
        for hook in hooked.values()
    )


def _known(**options: Any) -> dict[str, Any]:
    """Without what is None: a module in a block's place need not know of it."""
    return {name: value for name, value in options.items() if value is not None}


def _add(x: Tensor, branch: Tensor, gamma: Tensor | None, path: DropPath) -> Tensor:
    return scale_residual(x, branch, gamma, path.keep, kept=path.kept)


def _add_and_norm(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    path: DropPath,
    norm: nn.Module,
    norm_path: DropPath,
) -> tuple[Tensor, Tensor]:
    """x with the branch added, and the norm of it for the branch of `norm_path`."""
    if not is_plain(norm, nn.LayerNorm):
        x = _add(x, branch, gamma, path)
        return x, _norm(x, norm, norm_path)
    vectors = norm.weight, norm.bias, gamma, path.keep
    options = {"eps": norm.eps, "kept": path.kept, "norm_kept": norm_path.kept}
    return scale_residual_norm(x, branch, *vectors, **options)


def _norm(x: Tensor, norm: nn.Module, path: DropPath) -> Tensor:
    if is_plain(norm, nn.LayerNorm):
        return layer_norm(x, norm.weight, norm.bias, eps=norm.eps, kept=path.kept)
    return norm(x if path.kept is None else x.index_select(0, path.kept.samples))
