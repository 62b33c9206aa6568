"""timm's BEiT on our kernels (timm `models/beit.py`); imported where timm's is in use."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import beit
from torch import Tensor, fx, nn

from beit_fast.acceleration.patching import (
    Accelerated,
    Linear,
    add_branch,
    head_obstacle,
    normalize,
)
from beit_fast.kernels._triton import warn_once
from beit_fast.kernels.attention import attention_qkvpacked, rel_pos_attention_qkvpacked
from beit_fast.kernels.attention.rel_pos_bias import rel_pos_bias
from beit_fast.kernels.linear import linear
from beit_fast.model.layers import is_plain


class RelativePositionBias(Accelerated, beit.RelativePositionBias):
    replaces = beit.RelativePositionBias
    runs = "relative-position bias"

    def forward(self) -> Tensor:
        grid = tuple(self.window_size)
        table = self.relative_position_bias_table
        if isinstance(table, fx.Proxy):
            return self._as_leaf(table.tracer)
        return self._bias_cache.get(table, grid, lambda table: rel_pos_bias(table, grid))


class Attention(Accelerated, beit.Attention):
    replaces = beit.Attention
    runs = "attention with its bias"

    @staticmethod
    def obstacle(module: nn.Module) -> str | None:
        return head_obstacle(module.qkv.out_features // (3 * module.num_heads))

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        if isinstance(x, fx.Proxy):
            return self._as_leaf(x.tracer, x, shared_rel_pos_bias)
        if not self.fused_attn and not is_plain(self.attn_drop, nn.Dropout):
            warn_once("attention weights are hooked (attn_drop): timm's own attention runs there")
            return super().forward(x, shared_rel_pos_bias)
        qkv_BN3HK = self._project(x).unflatten(2, (3, self.num_heads, -1))
        drops = self.training if self.fused_attn else self.attn_drop.training
        options = {"scale": self.scale, "dropout_p": self.attn_drop.p if drops else 0.0}
        table, cache = self.relative_position_bias_table, self._bias_cache
        if table is None:
            out_BNHK = attention_qkvpacked(qkv_BN3HK, shared_rel_pos_bias, **options)
        elif shared_rel_pos_bias is None and not cache.holds(table):
            grid = tuple(self.window_size)
            out_BNHK = rel_pos_attention_qkvpacked(qkv_BN3HK, table, grid, **options)
        else:
            bias_HNN = self._dense_bias()
            if shared_rel_pos_bias is not None:
                bias_HNN = bias_HNN + shared_rel_pos_bias
            out_BNHK = attention_qkvpacked(qkv_BN3HK, bias_HNN, **options)
        return self.proj_drop(self.proj(out_BNHK.flatten(2)))

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values, (B, N, 3 H K), by the steps of timm's forward."""
        if self.q_bias is None:
            return self.qkv(x)
        qkv_bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if self.qkv_bias_separate:
            return self.qkv(x) + qkv_bias
        weight = self.qkv.weight
        plain = type(weight) in (Tensor, nn.Parameter)
        return linear(x, weight, qkv_bias) if plain else F.linear(x, weight, qkv_bias)

    def _dense_bias(self) -> Tensor:
        grid = tuple(self.window_size)
        table = self.relative_position_bias_table
        return self._bias_cache.get(table, grid, lambda table: rel_pos_bias(table, grid))


class Block(Accelerated, beit.Block):
    replaces = beit.Block
    runs = "residuals with LayerScale and drop path, and the norms"

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        if isinstance(x, fx.Proxy):
            return self._as_leaf(x.tracer, x, shared_rel_pos_bias)
        branch = self.attn(normalize(x, self.norm1), shared_rel_pos_bias=shared_rel_pos_bias)
        x, ln = _add(x, branch, self.gamma_1, self.drop_path1, self.norm2)
        return _add(x, self.mlp(ln), self.gamma_2, self.drop_path2)[0]


def _add(x, branch, gamma, drop_path, norm=None) -> tuple[Tensor, Tensor | None]:
    known = is_plain(drop_path, nn.Identity) or is_plain(drop_path, DropPath)
    return add_branch(x, branch, gamma, drop_path, _draw_keep if known else None, norm)


def _draw_keep(drop_path: nn.Module, branch: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The draw of timm's `drop_path`: the same numbers from the same generator."""
    rate = getattr(drop_path, "drop_prob", 0.0)
    if not rate or not drop_path.training:
        return None
    keep_B = branch.new_empty(len(branch), dtype=dtype).bernoulli_(1 - rate)
    return keep_B.div_(1 - rate) if rate < 1 and drop_path.scale_by_keep else keep_B


MODELS = (beit.Beit, beit.Block, beit.Attention)
REPLACEMENTS = (Attention, Block, RelativePositionBias, Linear)
