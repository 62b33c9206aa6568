"""BEiT's encoder (arXiv:2106.08254, figure 1): patches, mask token, [CLS], positions, blocks.

Parameters have the names and shapes of timm's `Beit` and of unilm's checkpoints.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from beit_fast.kernels._triton import warn_once
from beit_fast.kernels.attention.bias import padding_once
from beit_fast.kernels.input.mask_embed import mask_embed
from beit_fast.kernels.linear import NOT_TRACED
from beit_fast.model.config import BeitConfig
from beit_fast.model.fused import FusedBlock, rowwise_after_attention, run_blocks, select_rows
from beit_fast.model.init import init_pretraining
from beit_fast.model.intermediates import Layout, chosen_blocks, laid_out
from beit_fast.model.layers import RelativePositionBias
from beit_fast.model.patch_embed import PatchEmbed
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table

# What selective checkpointing keeps: products, and attention in each way that it is computed.
KEPT = frozenset(
    (
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm"),
        *("mkldnn::_linear_pointwise", "beit_fast::attention", "beit_fast::attention_qkvpacked"),
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    )
)


class Beit(nn.Module):
    """The encoder alone: images (B, C, height, width), normalised, to tokens (B, N, D).

    Wherever images go in, so do their patches (B, L, P), as `kernels.patches` makes them of uint8.
    With `config.dynamic_img_size` images may have any size that patches divide: positions are
    resized from the model's grid at every call, as `model.resize` does it, and their gradients go
    back through that.

    >>> Beit(BeitConfig(depth=2))(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 197, 768])
    """

    config_class = BeitConfig

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config
        num_tokens = config.num_patches + 1
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.mask_token: nn.Parameter | None = None  # masked image modelling adds it
        self.pos_embed: nn.Parameter | None = None
        if config.use_abs_pos_emb:
            self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, config.embed_dim))

        self.rel_pos_bias: RelativePositionBias | None = None
        if config.use_shared_rel_pos_bias:
            self.rel_pos_bias = RelativePositionBias(config)

        steps = max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(
            FusedBlock(config, config.drop_path_rate * i / steps) for i in range(config.depth)
        )
        self.grad_checkpointing: bool | Literal["selective"] = False
        self.register_load_state_dict_pre_hook(_drop_index)
        if type(self) is Beit:  # a head's class does this when the head is there too
            self.init_weights()

    def init_weights(self) -> None:
        """Start anew, as pre-training does; fills a model that `to_empty` left without values."""
        init_pretraining(self)

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script: raises ValueError that names the exporters of today."""
        raise ValueError(NOT_TRACED)

    def forward(
        self, images: Tensor, mask: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        return self.forward_features(images, mask, keep=keep)

    def forward_features(
        self, images: Tensor, mask: Tensor | None = None, *, keep: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, D) after the last block, before any norm; N = L + 1, [CLS] first.

        images (B, C, height, width), normalised, or patches (B, L, P) of them; mask bool (B, L),
        True where the patch is hidden. keep fp32 (2 depth, B): for drop path in training, 0 where a
        sample skips a branch and 1 / (1 - p) where not, attention's before the MLP's in each block;
        None: the blocks draw from torch's generator.
        Raises ValueError for images of another size or dtype, and for a mask that does not fit or
        that this model has no mask token for, and for keep of another shape or where
        `config.drop_path_compact` draws otherwise.
        """
        return self._encode(images, mask, keep=keep)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Layout = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """What chosen blocks give, and with it what `forward_features` does; timm's method.

        x: images (B, C, height, width) or patches (B, L, P). indices: of blocks; n the last n, None
        all. Each is (B, D, Gh, Gw), with output_fmt "NLC" (B, L, D); with `return_prefix_tokens` a
        pair of that and [CLS], (B, 1, D). `norm` applies the model's last norm, where it has one
        before pooling. `stop_early` computes no block that is not needed; the first value is then
        what the last of them gives.
        Raises ValueError for blocks that are not there, another format, and as `forward` does.
        """
        chosen = chosen_blocks(len(self.blocks), indices)
        blocks = self.blocks[: max(chosen) + 1] if stop_early else self.blocks
        given: list[Tensor] = []
        out = self._run(blocks, x, tap=given.append)
        grid = self.patch_embed.grid_of(x) or self.config.grid
        # Each block once, in the order of the blocks, as timm gives them.
        taps = [self._last_norm(given[i]) if norm else given[i] for i in sorted(set(chosen))]
        pairs = [laid_out(tap, grid, output_fmt) for tap in taps]
        intermediates = pairs if return_prefix_tokens else [patches for patches, _ in pairs]
        if intermediates_only:
            return intermediates
        return self._last_norm(out), intermediates

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """`forward_intermediates` under the name and with the arguments of DINO's models."""
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=output_fmt, intermediates_only=True
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last of those chosen, and on request norm and head.

        Returns their numbers. Raises ValueError for blocks that are not there.
        """
        del prune_norm, prune_head  # the encoder has neither
        chosen = chosen_blocks(len(self.blocks), indices)
        self.blocks = self.blocks[: max(chosen) + 1]
        self.config = replace(self.config, depth=len(self.blocks))
        return sorted(set(chosen))

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Take images of another size from now on; positions are resized as `model.resize` does.

        Raises ValueError for a size that patches do not divide, and for another patch size.
        """
        config = self.config
        if patch_size is not None:
            wanted = replace(config, img_size=img_size or config.img_size, patch_size=patch_size)
            if wanted.patch_pixels != config.patch_pixels:
                raise ValueError(
                    f"patch_size {patch_size}: these weights are of patches of "
                    f"{config.patch_pixels} px, build another model for another size"
                )
        if img_size is None:
            return
        self.config = replace(config, img_size=img_size)
        grids = config.grid, self.config.grid
        self.patch_embed.set_input_size(self.config)
        with torch.no_grad():
            if self.pos_embed is not None:
                self.pos_embed = _like(self.pos_embed, resize_pos_embed(self.pos_embed, *grids))
            holders = [block.attn for block in self.blocks]
            for holder in filter(None, (self.rel_pos_bias, *holders)):
                holder.grid = self.config.grid
                table = holder.relative_position_bias_table
                if table is not None:
                    resized = resize_rel_pos_table(table, *grids)
                    holder.relative_position_bias_table = _like(table, resized)

    @property
    def in_chans(self) -> int:
        return self.config.in_chans

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`; timm's name."""
        return self.config.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        """[CLS]."""
        return 1

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """timm's description of what each block gives."""
        reduction = max(self.config.patch_pixels)
        return [
            {"module": f"blocks.{i}", "num_chs": self.config.embed_dim, "reduction": reduction}
            for i in range(len(self.blocks))
        ]

    def _last_norm(self, x: Tensor) -> Tensor:
        """What `forward_features` ends with: the encoder alone has no norm after its blocks."""
        return x

    def _encode(
        self,
        images: Tensor,
        mask: Tensor | None,
        rows: Tensor | None = None,
        *,
        keep: Tensor | None = None,
    ) -> Tensor:
        """`forward_features`, or of listed rows alone, (I, 1, D) as `select_rows` gives them."""
        skips = rows is not None and rowwise_after_attention(self.blocks[-1])
        listed = rows if skips else None
        x = self._run(self.blocks, images, mask, listed, keep=keep)
        if rows is None or skips:
            return x
        warn_once(
            "skip_unread_rows: the last block computes all rows, for a module in it is hooked, "
            "compiled or replaced"
        )
        return select_rows(x, rows)

    def _run(
        self,
        blocks: Sequence[nn.Module],
        images: Tensor,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        tap: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """The sequence through these blocks; `rows`, `keep` and `tap` as for `run_blocks`."""
        if not isinstance(images, Tensor):
            raise TypeError(
                f"the images are a {type(images).__name__}: pass a tensor (B, C, height, width) of "
                "normalised floats, torch.from_numpy(...) or torch.stack(...)"
            )
        grid = self.patch_embed.grid_of(images)
        x_BND = self._embed(images, mask)
        if keep is not None:
            self._check_keep(keep, len(x_BND))
        shared_bias_HNN = None
        if self.rel_pos_bias is not None:
            shared_bias_HNN = self.rel_pos_bias(grid)
        if self.grad_checkpointing and torch.is_grad_enabled():
            blocks = [functools.partial(self._recompute, block) for block in blocks]
        is_compiled = torch.compiler.is_compiling()
        with contextlib.nullcontext() if is_compiled else padding_once():
            return run_blocks(blocks, x_BND, shared_bias_HNN, grid, rows, keep=keep, tap=tap)

    def _recompute(self, block: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        if self.grad_checkpointing == "selective":
            options["context_fn"] = functools.partial(
                create_selective_checkpoint_contexts, _keep_products
            )
        return checkpoint(block, *arguments, use_reentrant=False, **options)

    def set_grad_checkpointing(self, enable: bool | Literal["selective"] = True) -> None:
        """Recompute in the backward pass instead of keeping activations, for large grids.

        True keeps each block's input and computes the block twice: a third more arithmetic.
        "selective" also keeps what its products and its attention give, and computes norms, GELU,
        residuals and drop path twice: no more arithmetic to speak of.
        Raises ValueError for anything else.
        """
        if enable not in (False, True, "selective"):
            raise ValueError(f"grad checkpointing is {enable!r}: pass True, False or 'selective'")
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters never decayed though they have more than one axis, as in the original.

        `mask_token` and the relative tables are decayed there, so they are here (timm spares the
        tables).
        """
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups, for layer-wise lr decay: stem, one per block, head.

        `coarse` is timm's argument; the groups are the same with it.
        """
        del coarse
        return {
            "stem": r"^cls_token|mask_token|pos_embed|patch_embed|rel_pos_bias",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """The sequence that enters the first block (paper 2.1 and 2.3), (B, N, D).

        A hidden patch becomes the mask token before positions are added: it stays in its place.
        """
        x_BLD = self.patch_embed(images)
        mask_token = None
        if mask is not None:
            self._check_mask(mask, x_BLD)
            mask_token = self.mask_token.flatten()
        pos = self.pos_embed
        if pos is not None:
            grid = self.patch_embed.grid_of(images)
            pos = pos if grid is None else resize_pos_embed(pos, self.config.grid, grid)
            pos = pos.flatten(0, 1)
        return mask_embed(x_BLD, self.cls_token.flatten(), mask_token, mask, pos)

    def _check_keep(self, keep: Tensor, num_images: int) -> None:
        wanted = (2 * len(self.blocks), num_images)
        if self.config.drop_path_compact:
            raise ValueError(
                "keep came, and with drop_path_compact the blocks draw which of a fixed number of "
                "samples they keep: pass no keep, or build the model without drop_path_compact"
            )
        if keep.shape != wanted or keep.dtype != torch.float32:
            raise ValueError(
                f"keep is {keep.dtype} {tuple(keep.shape)}: pass float32 {wanted}, two rows a block"
            )

    def _check_mask(self, mask: Tensor, x: Tensor) -> None:
        if self.mask_token is None:
            raise ValueError(
                "a mask came, and this model has no mask token: pass no mask, or use "
                "BeitForMaskedImageModeling"
            )
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            raise ValueError(
                f"the mask is {mask.dtype} {tuple(mask.shape)}: pass bool {tuple(x.shape[:2])}, "
                "True where a patch is hidden"
            )


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """A parameter of this value, frozen where the other is."""
    return nn.Parameter(value.detach().clone(), requires_grad=parameter.requires_grad)


def _keep_products(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    keeps = operator.name() in KEPT
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def _drop_index(_module: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    """unilm's files store the index matrices, which follow from the grid."""
    for key in [key for key in state_dict if key.endswith("relative_position_index")]:
        del state_dict[key]
