"""What is asked of the encoder: the visual tokens of hidden patches, or the class of the image."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from beit_fast.kernels.arguments import check_index, check_product
from beit_fast.kernels.head.gather_rows import gather_rows
from beit_fast.kernels.head.linear_argmax import linear_argmax
from beit_fast.kernels.head.linear_cross_entropy import masked_linear_cross_entropy
from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig
from beit_fast.model.init import init_finetuning
from beit_fast.model.layers import Linear


class BeitForMaskedImageModeling(Beit):
    """The encoder with a mask token, a final norm and `lm_head` (paper 2.3 and 2.5).

    `lm_head` scores the visual vocabulary, or with `config.predict` "pixels" regresses a patch.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__(config)
        out_dim = config.vocab_size if config.predict == "tokens" else config.patch_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.lm_head = Linear(config.embed_dim, out_dim)
        self.init_weights()

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """`lm_head`'s output at every patch, (B, L, V) or (B, L, values in a patch)."""
        x_BND = self.forward_features(images, mask)
        return self.lm_head(self.norm(x_BND[:, 1:]))

    def loss(
        self,
        images: Tensor,
        mask: Tensor,
        masked_index: Tensor,
        visual_tokens: Tensor,
        *,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy at the listed patches, and how many are predicted right (scalars).

        images (B, C, height, width), normalised; mask bool (B, L), True where hidden; masked_index
        int32 (I,), patches to predict as b L + l, -1 for padding, of any fixed length;
        visual_tokens int64 (B, L), or (I,) for the listed patches alone. Only listed patches reach
        the norm and the head. The index usually lists what the mask hides, but need not: all
        patches make the "all tokens" ablation. keep as of `Beit.forward_features`. Where nothing is
        listed the loss is 0.
        Raises ValueError where shapes do not fit or this model predicts pixels.
        """
        self._check_predicts("tokens")
        check_index(masked_index)
        target_I = visual_tokens
        if visual_tokens.shape != masked_index.shape:
            self._check_tokens(visual_tokens, mask)
            target_I = visual_tokens.flatten().index_select(0, masked_index.clamp(min=0))
        return masked_linear_cross_entropy(
            *self._listed_tokens(images, mask, masked_index, keep),
            target_I,
            self.lm_head.weight,
            self.lm_head.bias,
            self.norm.weight,
            self.norm.bias,
            norm_eps=self.config.norm_eps,
        )

    def pixel_loss(
        self,
        images: Tensor,
        mask: Tensor,
        masked_index: Tensor,
        *,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the listed patches' normalised pixels: the ablation of Table 4.

        Arguments as of `loss`. Raises ValueError where shapes do not fit or this model predicts
        tokens.
        """
        self._check_predicts("pixels")
        rows_ID = gather_rows(*self._listed_tokens(images, mask, masked_index, keep))
        patches_BLP = self.patch_embed.patches(images)
        target_IP = patches_BLP.flatten(0, 1).index_select(0, masked_index.clamp(min=0))
        real = masked_index >= 0
        error_I = (self.lm_head(self.norm(rows_ID)).float() - target_IP).square().mean(dim=1)
        return torch.where(real, error_I, 0).sum() / real.sum().clamp(min=1)

    @torch.no_grad()
    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """The likeliest visual token of every patch, int64 (B, L); call `eval()` first.

        Scores are those of fp32, under autocast too, and are not stored.
        Raises ValueError where shapes do not fit or this model predicts pixels.
        """
        self._check_predicts("tokens")
        x_BLD = self.norm(self.forward_features(images, mask)[:, 1:])
        return linear_argmax(x_BLD, self.lm_head.weight, self.lm_head.bias, precision="tf32x3")

    def _listed_tokens(
        self, images: Tensor, mask: Tensor, masked_index: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens before the norm, and which of their rows the listed patches are; -1: padding.

        All tokens (B, N, D), or if the config says so and it is less, the listed ones (I, 1, D).
        """
        check_index(masked_index)
        if mask.ndim != 2:
            raise ValueError(
                f"the mask is {mask.dtype} {tuple(mask.shape)}: pass bool (B, L), True where a "
                "patch is hidden"
            )
        # Patch b L + l is row b N + 1 + l of the sequence, N = L + 1; floor: -1 // L is -1.
        rows = masked_index + masked_index // mask.shape[1] + 1
        if not self.config.skip_unread_rows or len(rows) >= mask.numel():
            return self.forward_features(images, mask, keep=keep), rows
        places = torch.arange(len(rows), dtype=rows.dtype, device=rows.device)
        return self._encode(images, mask, rows, keep=keep), torch.where(rows == -1, -1, places)

    def _check_predicts(self, wanted: str) -> None:
        if self.config.predict != wanted:
            raise ValueError(
                f"this model predicts {self.config.predict}: build it with predict={wanted!r}"
            )

    def _check_tokens(self, visual_tokens: Tensor, mask: Tensor) -> None:
        if visual_tokens.shape != mask.shape:
            raise ValueError(
                f"visual tokens {tuple(visual_tokens.shape)} for a mask {tuple(mask.shape)}: pass "
                "one token per patch (B, L); a tokenizer of stride 8 wants images of 8 pixels for "
                "each patch"
            )


class BeitForImageClassification(Beit):
    """The encoder with pooling and a linear classifier; state dicts are those of timm's `Beit`.

    Mean pooling (the default, `fc_norm` after it) or the [CLS] token (`norm` before it); with
    `num_classes` 0 the output is the pooled features.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__(config)
        norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        follows = config.norm_follows_pooling
        self.norm, self.fc_norm = (nn.Identity(), norm) if follows else (norm, nn.Identity())
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head: nn.Module = nn.Identity()
        if config.num_classes:
            self.head = nn.Linear(config.embed_dim, config.num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Start anew, as fine-tuning does where the checkpoint has nothing."""
        init_finetuning(self)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes); without classes, features (B, D). keep as of `Beit`."""
        return self.forward_head(self.forward_features(images, keep=keep))

    def forward_features(
        self, images: Tensor, mask: Tensor | None = None, *, keep: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, D) as timm gives them: through `norm` where the [CLS] token is pooled."""
        return self.norm(super().forward_features(images, mask, keep=keep))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, D) to logits (B, num_classes), or with `pre_logits` to features (B, D).

        Without pooling (global_pool "") the same of every token, (B, N, num_classes).
        Raises ValueError for anything but tokens, and for another dtype than the head's.
        """
        if isinstance(x, Tensor):
            self._check_head_takes(x)
        if self.config.global_pool:
            x = x[:, 1:].mean(dim=1) if self.config.global_pool == "avg" else x[:, 0]
        features = self.head_drop(self.fc_norm(x))
        return features if pre_logits else self.head(features)

    def _check_head_takes(self, x: Tensor) -> None:
        D = self.config.embed_dim
        if x.ndim != 3 or x.shape[2] != D or not x.is_floating_point():
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}: pass tokens (B, N, {D}), floats, as "
                "forward_features gives them"
            )
        weights = (getattr(part, "weight", None) for part in (self.fc_norm, self.head))
        first = next((weight for weight in weights if isinstance(weight, Tensor)), x)
        if x.dtype != first.dtype:
            check_product(x=x, weight=first)

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def global_pool(self) -> str:
        return self.config.global_pool

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier takes."""
        return self.config.embed_dim

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of so many classes; 0: none. Pooling stays unless one is given, the
        norm stays where it is.

        Its weights are torch's, as timm's are. Raises ValueError for another pooling.
        """
        changes = {"num_classes": num_classes, "use_fc_norm": self.config.norm_follows_pooling}
        if global_pool is not None:
            changes["global_pool"] = global_pool
        self.config = replace(self.config, **changes)
        self.head = nn.Identity()
        if num_classes:
            like = self.cls_token
            options = {"device": like.device, "dtype": like.dtype}
            self.head = nn.Linear(self.config.embed_dim, num_classes, **options)
        self.head.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        chosen = super().prune_intermediate_layers(indices)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return chosen

    def _last_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)
