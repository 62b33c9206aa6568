"""The parts of a BEiT block (pre-norm), parameters under timm's names.

x = x + keep_1 gamma_1 Attention(LN(x));  x = x + keep_2 gamma_2 Mlp(LN(x))
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.kernels.attention import attention_qkvpacked
from beit_fast.kernels.linear import linear
from beit_fast.kernels.rel_pos_bias import rel_pos_bias, relative_position_rows
from beit_fast.kernels.scale_residual import scale_residual
from beit_fast.model.config import BeitConfig


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
    B2-224 for Base, one core. Raises ValueError for images of another size than the model's.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.image_shape = (config.in_chans, *config.image_pixels)
        self.patch_pixels = config.patch_pixels
        self.proj = nn.Conv2d(
            config.in_chans, config.embed_dim, config.patch_pixels, stride=config.patch_pixels
        )

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            channels, height, width = self.image_shape
            raise ValueError(
                f"the images are {tuple(images.shape)}, the model takes (B, {channels}, {height}, "
                f"{width}): resize the images, or build the model with another img_size and resize "
                "its positions with beit_fast.model.resize"
            )
        patches = patchify(images, self.patch_pixels)
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class RelativePositionBias(nn.Module):
    """The table that all blocks share: index (N, N) -> bias (H, N, N)."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.relative_position_bias_table = _table(config)

    def forward(self, index: Tensor) -> Tensor:
        return rel_pos_bias(self.relative_position_bias_table, index)


class Attention(nn.Module):
    """Self-attention, biased by the block's own table where it has one plus the shared bias.

    Queries and values have a trained bias, keys a hard zero: softmax would not see it.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        width = config.num_heads * config.head_dim
        self.qkv = Linear(config.embed_dim, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("k_bias", torch.zeros(width), persistent=False)
        self.relative_position_bias_table = _table(config) if config.use_rel_pos_bias else None
        self.proj = Linear(width, config.embed_dim)

    def forward(self, x: Tensor, shared_bias: Tensor | None, index: Tensor | None) -> Tensor:
        """x (B, N, D); shared_bias (H, N, N); index (N, N), needed by the block's own table."""
        # 3 us of 45 ms at B2-N197-D768: a packed bias would save nothing, and cost its own names.
        qkv_bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv_BND3 = linear(x, self.qkv.weight, qkv_bias)
        qkv_BN3HK = qkv_BND3.unflatten(2, (3, self.num_heads, -1))
        bias_HNN = shared_bias
        if self.relative_position_bias_table is not None:
            bias_HNN = rel_pos_bias(self.relative_position_bias_table, index)
            if shared_bias is not None:
                bias_HNN = bias_HNN + shared_bias
        out_BNHK = attention_qkvpacked(qkv_BN3HK, bias_HNN)
        return self.proj(out_BNHK.flatten(2))


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), the exact (erf) GELU."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        hidden_dim = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = Linear(config.embed_dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


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
            self.gamma_1 = nn.Parameter(torch.full((config.embed_dim,), config.init_values))
            self.gamma_2 = nn.Parameter(torch.full((config.embed_dim,), config.init_values))

    def forward(self, x: Tensor, shared_bias: Tensor | None, index: Tensor | None) -> Tensor:
        """x (B, N, D) -> (B, N, D); shared_bias and index as `Attention.forward` takes them."""
        branch = self.attn(self.norm1(x), shared_bias, index)
        x = scale_residual(x, branch, self.gamma_1, self._draw_keep(x))
        branch = self.mlp(self.norm2(x))
        return scale_residual(x, branch, self.gamma_2, self._draw_keep(x))

    def _draw_keep(self, x: Tensor) -> Tensor | None:
        """Per sample 0 or 1 / (1 - p), from torch's default generator; None: all are kept."""
        if not self.training or self.drop_path_rate == 0:
            return None
        keep_rate = 1 - self.drop_path_rate
        keep_B = torch.empty(len(x), device=x.device)
        return keep_B.bernoulli_(keep_rate).div_(keep_rate)


def _table(config: BeitConfig) -> nn.Parameter:
    return nn.Parameter(torch.zeros(relative_position_rows(config.grid), config.num_heads))
