"""A BEiT block as the paper has it (pre-norm), parameters under timm's names.

    x = x + drop_path(gamma_1 Attention(LN(x)))
    x = x + drop_path(gamma_2 Mlp(LN(x)))

This is the specification. Models run `fused.FusedBlock`, the same in fewer passes over memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.kernels.attention import attention_qkvpacked, rel_pos_attention_qkvpacked
from beit_fast.kernels.attention.rel_pos_bias import rel_pos_bias, relative_position_rows
from beit_fast.kernels.linear import linear
from beit_fast.model.config import BeitConfig
from beit_fast.model.resize import resize_rel_pos_table


class Block(nn.Module):
    """Attention and MLP, each a residual branch with LayerScale and its own draw of drop path."""

    def __init__(self, config: BeitConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.gamma_1 = self.gamma_2 = None
        if config.init_values:
            self.gamma_1 = nn.Parameter(torch.full((config.embed_dim,), float(config.init_values)))
            self.gamma_2 = nn.Parameter(torch.full((config.embed_dim,), float(config.init_values)))

    def forward(
        self,
        x: Tensor,
        shared_bias: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, D) -> (B, N, D); keep (2, B), of each branch what `draw_keep` would draw; other
        arguments as of `Attention`."""
        for_attn, for_mlp = (None, None) if keep is None else keep.unbind()
        branch = scaled(self.gamma_1, self.attn(self.norm1(x), shared_bias, grid))
        x = x + self.drop_path(branch, for_attn)
        return x + self.drop_path(scaled(self.gamma_2, self.mlp(self.norm2(x))), for_mlp)

    def drop_path(self, branch: Tensor, keep: Tensor | None = None) -> Tensor:
        """Stochastic depth: in training some samples skip the branch (B, N, D)."""
        keep_B = self.given_or_drawn(keep, branch)
        return branch if keep_B is None else keep_B.to(branch.dtype)[:, None, None] * branch

    def given_or_drawn(self, keep: Tensor | None, x: Tensor) -> Tensor | None:
        """keep (B,) if it came, in training, else what `draw_keep` gives.

        Without a look at the rate, so that blocks compiled one by one share a graph.
        """
        if keep is None:
            return self.draw_keep(x)
        return keep if self.training else None

    def draw_keep(self, x: Tensor) -> Tensor | None:
        """Per sample 0 or 1 / (1 - p), from torch's default generator as timm draws: (B,), fp32.

        None where none is dropped.
        """
        if not self.training or self.drop_path_rate == 0:
            return None
        keep_rate = 1 - self.drop_path_rate
        return torch.empty(len(x), device=x.device).bernoulli_(keep_rate).div_(keep_rate)


def scaled(gamma: Tensor | None, branch: Tensor) -> Tensor:
    """LayerScale, in models that have it."""
    return branch if gamma is None else gamma * branch


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
        self, x: Tensor, shared_bias: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """x (B, N, D) -> (B, N, D); shared_bias (H, N, N) or None.

        grid (Gh, Gw) of the patches in x; None: the model's own.
        """
        return self.proj(self.mix(x, shared_bias, grid))

    def mix(
        self, x: Tensor, shared_bias: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """What each head gathers for each token, (B, N, H K): all of `forward` but `proj`."""
        qkv_BN3HK = self._project(x).unflatten(2, (3, self.num_heads, -1))
        table = self.relative_position_bias_table
        if table is None:
            out_BNHK = attention_qkvpacked(qkv_BN3HK, shared_bias)
        elif shared_bias is None:
            out_BNHK = rel_pos_attention_qkvpacked(qkv_BN3HK, *_on_grid(table, self.grid, grid))
        else:
            own_HNN = rel_pos_bias(*_on_grid(table, self.grid, grid))
            out_BNHK = attention_qkvpacked(qkv_BN3HK, own_HNN + shared_bias)
        return out_BNHK.flatten(2)

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side, (B, N, 3 H K)."""
        if self.q_bias is None:
            return self.qkv(x)
        # 3 us of 45 ms at B2-N197-D768: a packed bias would save nothing, and cost its own names.
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if is_plain(self.qkv, Linear):
            return linear(x, self.qkv.weight, bias)
        return self.qkv(x) + bias  # hooked, or another layer in its place


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), the exact (erf) GELU."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        hidden_dim = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = Linear(config.embed_dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class RelativePositionBias(nn.Module):
    """The table that all blocks share, as a dense bias (H, N, N): their gradients of it add up."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.relative_position_bias_table = _table(config)

    def forward(self, grid: tuple[int, int] | None = None) -> Tensor:
        """Of another grid's patches where one is given."""
        return rel_pos_bias(*_on_grid(self.relative_position_bias_table, self.grid, grid))


class Linear(nn.Linear):
    """torch's layer, computed by `kernels.linear`; hooks, isinstance and names stay torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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
