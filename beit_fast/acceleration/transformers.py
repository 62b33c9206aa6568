"""transformers' BEiT on our kernels (transformers 5 `models/beit/modeling_beit.py`)."""

import torch
import transformers
from torch import Tensor, nn
from transformers.models.beit import modeling_beit

from beit_fast.acceleration.patching import (
    Accelerated,
    Linear,
    add_branch,
    head_obstacle,
    normalize,
)
from beit_fast.kernels._triton import warn_once
from beit_fast.kernels.attention import attention
from beit_fast.kernels.attention.rel_pos_bias import rel_pos_bias
from beit_fast.model.layers import is_plain

if not hasattr(modeling_beit, "BeitMLP"):
    raise ImportError(
        "accelerate() knows BEiT as transformers 5 writes it, this is transformers "
        f"{transformers.__version__}: pip install 'transformers>=5.17'"
    )


class BeitRelativePositionBias(Accelerated, modeling_beit.BeitRelativePositionBias):
    replaces = modeling_beit.BeitRelativePositionBias
    runs = "relative-position bias"

    def forward(
        self,
        window_size: tuple[int, int],
        interpolate_pos_encoding: bool = False,
        dim_size: int | None = None,
    ) -> Tensor:
        """(1, H, N, N). A grid of another size, or not square, is interpolated by transformers."""
        grid = tuple(self.window_size)
        num_tokens = grid[0] * grid[1] + 1
        is_own = tuple(window_size) == grid and grid[0] == grid[1]
        if torch.jit.is_tracing() or not is_own:
            return super().forward(window_size, interpolate_pos_encoding, dim_size)
        if interpolate_pos_encoding and dim_size != num_tokens:
            return super().forward(window_size, interpolate_pos_encoding, dim_size)
        table = self.relative_position_bias_table
        bias_HNN = self._bias_cache.get(table, grid, lambda table: rel_pos_bias(table, grid))
        return bias_HNN[None]


class BeitAttention(Accelerated, modeling_beit.BeitAttention):
    replaces = modeling_beit.BeitAttention
    runs = "attention"

    @staticmethod
    def obstacle(module: nn.Module) -> str | None:
        implementation = module.config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            return f"attn_implementation={implementation!r} asks for an attention of its own"
        return head_obstacle(module.head_dim)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        if self._asks_for_weights(kwargs):
            warn_once("attention weights are asked for: transformers' own attention runs there")
            return super().forward(hidden_states, attention_mask, **kwargs)
        if self.config._attn_implementation not in ("eager", "sdpa"):
            name = self.config._attn_implementation
            warn_once(f"attn_implementation is {name!r} now: transformers' own attention runs")
            return super().forward(hidden_states, attention_mask, **kwargs)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in projections)
        out_BNHK = attention(
            q,
            k,
            v,
            _bias_of(attention_mask, q),
            scale=self.scaling,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(out_BNHK.flatten(2)), None

    def _asks_for_weights(self, kwargs: dict) -> bool:
        if kwargs.get("output_attentions", self.config.output_attentions):
            return True
        if self.config._attn_implementation != "eager":
            return False
        # transformers' own hooks stay on once they have been used; they ask by the option above.
        capturing = "transformers.utils.output_capturing"
        return any(hook.__module__ != capturing for hook in self._forward_hooks.values())


class BeitLayer(Accelerated, modeling_beit.BeitLayer):
    replaces = modeling_beit.BeitLayer
    runs = "residuals with LayerScale and drop path, and the norms"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs,
    ) -> Tensor:
        x = hidden_states
        if self.relative_position_bias is not None:
            height, width = resolution
            window_size = (height // self.patch_size, width // self.patch_size)
            bias = self.relative_position_bias(
                window_size, interpolate_pos_encoding, dim_size=x.shape[1]
            )
            attention_mask = bias if attention_mask is None else bias + attention_mask
        ln = normalize(x, self.layernorm_before)
        branch, _ = self.attention(ln, attention_mask=attention_mask, **kwargs)
        x, ln = self._add(x, branch, self.lambda_1, self.layernorm_after)
        return self._add(x, self.mlp(ln), self.lambda_2)[0]

    def _add(self, x, branch, gamma, norm=None) -> tuple[Tensor, Tensor | None]:
        path = self.drop_path
        known = is_plain(path, nn.Identity) or is_plain(path, modeling_beit.BeitDropPath)
        gamma = gamma if isinstance(gamma, Tensor) else None  # without LayerScale it is 1.0
        draw_keep = _draw_keep if known else None
        return add_branch(x, self.dropout(branch), gamma, path, draw_keep, norm)


def _bias_of(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """An additive bias (G, H, N, M) from what transformers passes, (1 or B, 1 or H, N, M)."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return mask.expand(-1, q.shape[2], q.shape[1], -1)


def _draw_keep(drop_path: nn.Module, branch: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The draw of `BeitDropPath`: the same numbers from the same generator."""
    rate = getattr(drop_path, "drop_prob", 0.0)
    if not rate or not drop_path.training:
        return None
    keep_B = torch.rand(len(branch), dtype=dtype, device=branch.device)
    return keep_B.add_(1 - rate).floor_().div_(1 - rate)


MODELS = (modeling_beit.BeitPreTrainedModel, modeling_beit.BeitLayer, modeling_beit.BeitAttention)
REPLACEMENTS = (BeitAttention, BeitLayer, BeitRelativePositionBias, Linear)
