"""BEiT's encoder (arXiv:2106.08254, figure 1): patches, mask token, [CLS], positions, blocks.

Parameters have the names and shapes of timm's `Beit` and of unilm's checkpoints.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from beit_fast.kernels._triton import warn_once
from beit_fast.kernels.mask_embed import mask_embed
from beit_fast.model.config import BeitConfig
from beit_fast.model.init import init_pretraining
from beit_fast.model.layers import (
    Block,
    PatchEmbed,
    RelativePositionBias,
    rowwise_after_attention,
    run_blocks,
    select_rows,
)
from beit_fast.model.resize import resize_pos_embed

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
            Block(config, config.drop_path_rate * i / steps) for i in range(config.depth)
        )
        self.grad_checkpointing: bool | Literal["selective"] = False
        self.register_load_state_dict_pre_hook(_drop_index)
        if type(self) is Beit:  # a head's class does this when the head is there too
            self.init_weights()

    def init_weights(self) -> None:
        """Start anew, as pre-training does; fills a model that `to_empty` left without values."""
        init_pretraining(self)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.forward_features(images, mask)

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) after the last block, before any norm; N = L + 1, [CLS] first.

        images (B, C, height, width), normalised, or patches (B, L, P) of them; mask bool (B, L),
        True where the patch is hidden.
        Raises ValueError for images of another size, and for a mask that does not fit or that
        this model has no mask token for.
        """
        return self._encode(images, mask)

    def _encode(self, images: Tensor, mask: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """`forward_features`, or of listed rows alone, (I, 1, D) as `select_rows` gives them."""
        skips = rows is not None and rowwise_after_attention(self.blocks[-1])
        listed = rows if skips else None
        x = self._run(self.blocks, images, mask, listed)
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
        tap: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """The sequence through these blocks; `rows` and `tap` as for `run_blocks`."""
        grid = self.patch_embed.grid_of(images)
        x_BND = self._embed(images, mask)
        shared_bias_HNN = None
        if self.rel_pos_bias is not None:
            shared_bias_HNN = self.rel_pos_bias(grid)
        if self.grad_checkpointing and torch.is_grad_enabled():
            blocks = [functools.partial(self._recompute, block) for block in blocks]
        return run_blocks(blocks, x_BND, shared_bias_HNN, rows, grid=grid, tap=tap)

    def _recompute(self, block: nn.Module, *arguments: Any) -> Tensor:
        options = {}
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


def _keep_products(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    keeps = operator.name() in KEPT
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def _drop_index(_module: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    """unilm's files store the index matrices, which follow from the grid."""
    for key in [key for key in state_dict if key.endswith("relative_position_index")]:
        del state_dict[key]
