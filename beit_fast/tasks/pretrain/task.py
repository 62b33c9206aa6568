"""Masked image modelling: predict the visual tokens of hidden patches (BEiT section 2).

tokens = tokenizer(second view)                              no gradient
loss   = mean over hidden patches of -log p(tokens | first view with hidden patches replaced)
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor

from beit_fast.data.loader import Loader
from beit_fast.data.samples import CachedSample, PretrainSample
from beit_fast.data.token_cache import TokenCache, check_made_from, describe
from beit_fast.data.views.color_jitter import jitter_views
from beit_fast.data.views.statistics import (
    STATISTICS,
)
from beit_fast.flags import flag
from beit_fast.kernels.input.patches import normalized_patches
from beit_fast.model.fp8 import use_fp8
from beit_fast.model.heads import BeitForMaskedImageModeling
from beit_fast.tasks.drop_path import DropPathDraws
from beit_fast.tasks.layer_decay import spared_from_decay
from beit_fast.tasks.pretrain.config import PretrainConfig, as_flag, as_text
from beit_fast.tasks.sources import open_loader, unseen_batches
from beit_fast.tokenizer.checkpoint import load_tokenizer, tokenizer_digest
from beit_fast.tokenizer.config import STRIDE
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.tokenizer.frozen import FrozenTokenizer
from beit_fast.tokenizer.metrics import code_entropy, count_codes
from beit_fast.tokenizer.protocol import Tokenizer
from beit_fast.train.parallel import compile_blocks
from beit_fast.train.stop import heeded
from beit_fast.train.world import World
from beit_fast.viz.reconstruction import draw_columns, hide_patches

NUM_PICTURES = 8


@dataclass(frozen=True)
class TokensToCome:
    """What is known of a tokenizer before it is trained."""

    vocab_size: int
    stride: int = STRIDE  # pixels a token


def _with_tokenizer(method: Callable) -> Callable:
    """The method with the tokenizer loaded for its time, where a cache keeps it out of training and
    the configuration names its file."""

    @functools.wraps(method)
    def call(self: "PretrainTask", model: BeitForMaskedImageModeling, *args: Any, **kwargs: Any):
        if self.cache is None or self.config.tokenizer is None:
            return method(self, model, *args, **kwargs)
        device = next(model.parameters()).device
        self.tokenizer = frozen(load_tokenizer(self.config.tokenizer), self.config).to(device)
        try:
            return method(self, model, *args, **kwargs)
        finally:
            self.tokenizer = None

    return call


class PretrainTask:
    """BEiT's pre-training as a task of the loop.

    Tokens come from the tokenizer or, where the configuration names a token cache, from there; then
    `tokenizer` is None. One that is yet to be trained comes later, by `use`. Raises TokenCacheError
    for a cache that is damaged or was made from something else.
    """

    name = "pretrain"

    def __init__(
        self, config: PretrainConfig, tokenizer: Tokenizer | TokensToCome | None, world: World
    ) -> None:
        model, views = config.model, config.views
        self.predicts_tokens = model.predict == "tokens"
        self.cache = None
        if config.token_cache is not None:
            assert tokenizer is None, "a token cache takes its place"
            self.cache = TokenCache(config.token_cache, part=world.rank, parts=world.size)
        if model.in_chans != 3:
            raise ValueError(
                f"model.in_chans is {model.in_chans}: images here have 3 channels, pass "
                "--model.in_chans 3"
            )
        self.config, self.tokenizer = config, None
        if tokenizer is not None:
            self.use(tokenizer)
        torch.manual_seed(config.run.seed)
        self.model = BeitForMaskedImageModeling(model)
        self.model.set_grad_checkpointing(config.grad_checkpointing)
        self.blocks = tuple(self.model.blocks)
        self._loss = self.model.loss if self.predicts_tokens else self.model.pixel_loss
        self.counters = {}
        if self.predicts_tokens:
            self.counters["token_counts"] = torch.zeros(model.vocab_size, dtype=torch.float64)
        sample = PretrainSample(views, config.masking, model.grid)
        self.loader = open_loader(config.data, sample, seed=config.run.seed, world=world)
        self._unseen_loader = self.loader
        if self.cache is not None:
            self._check_cache()
            self.loader.images.fixed = (
                "tokens of a cache are of one list of images: restore the folder and its "
                f"{flag('token_cache')}, or give another {flag('run.output')}"
            )
            name = self.loader.source.name
            cached = CachedSample(views, config.masking, model.grid, self.cache, name)
            self.loader = self.loader.with_sample(cached)
            if config.tokenizer is None:
                self._unseen_loader = self.loader
        self.batches_per_epoch = self.loader.batches_per_epoch
        self.num_images, self.images = len(self.loader.source), self.loader.images
        self.images_per_batch = config.data.batch_size
        self._drop_path = DropPathDraws(self.model, config.run, self.images_per_batch, world)

    def use(self, tokenizer: Tokenizer | TokensToCome) -> None:
        """Take this tokenizer. Raises ValueError as `check_tokenizer` does."""
        check_tokenizer(tokenizer, self.config)
        if not isinstance(tokenizer, TokensToCome):
            self.tokenizer = frozen(tokenizer, self.config)

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        if self.config.run.precision == "fp8":
            use_fp8(self.model, device)
        if self.tokenizer is not None:
            self.tokenizer.to(device)
        self.counters = {name: counter.to(device) for name, counter in self.counters.items()}

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        return self._drop_path.added_to(self.loader.batches(start), start)

    def take_rank(self, world: World) -> None:
        self.loader = self.loader.of_rank(world.rank, world.size)
        self._drop_path = self._drop_path.of_rank(world)

    def sample_name(self, index: int) -> str:
        return self.loader.source.name(index)

    def compile(self, mode: str, *, by_block: bool = False) -> None:
        if by_block:
            compile_blocks(self.blocks, mode)
            return
        self._loss = torch.compile(self._loss, fullgraph=True, dynamic=False, mode=mode)

    def begin_step(self, step: int) -> None:
        """Nothing here changes over the run."""

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Patches, mask and index as the model takes them, and the tokens of those listed."""
        batch = jitter_views(batch)
        patches, mask, index = self._inputs(batch)
        prepared = {"patches": patches, "mask": mask, "masked_index": index}
        if self.predicts_tokens:
            prepared["tokens"] = self._tokens(batch, index)
        if "keep" in batch:
            prepared["keep"] = batch["keep"]
        return prepared

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """The patches to predict."""
        return (batch["masked_index"] >= 0).sum().float()

    def stand_in(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """With a token of each patch, for there may be no tokenizer yet."""
        grid = (len(batch["mask"]), self.config.model.num_patches)
        return {"tokens": torch.zeros(grid, dtype=torch.int64)} | batch

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        index, keep = batch["masked_index"], batch.get("keep")
        if not self.predicts_tokens:
            return self._loss(batch["patches"], batch["mask"], index, keep=keep), {}
        tokens = batch["tokens"]
        loss, num_correct = self._loss(batch["patches"], batch["mask"], index, tokens, keep=keep)
        predicted = index >= 0
        # Counts are whole numbers in fp64: exact, so their order of summation does not matter.
        self.counters["token_counts"].index_add_(0, tokens.clamp(min=0), predicted.double())
        return loss, {"accuracy": num_correct / predicted.sum().clamp(min=1)}

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        spared = spared_from_decay(
            self.model, spare_tables=not self.config.weight_decay_on_rel_pos_bias
        )
        # By keyword: which place an option has differs between versions of timm.
        return param_groups_weight_decay(
            self.model, weight_decay=weight_decay, no_weight_decay_list=spared
        )

    def report(self, counters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.predicts_tokens:
            return {}
        return {"marginal_entropy": code_entropy(counters["token_counts"])}

    def _inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """First view in patches, mask and the flat indices of those to predict, on the device."""
        mean, std = STATISTICS[self.config.statistics]
        # Pixels that are to be predicted stay as exact as they are; the product rounds its own.
        dtype = torch.float32 if self.tokenizer is None else None
        patches = normalized_patches(
            batch["images"], self.config.model.patch_pixels, mean, std, dtype=dtype
        )
        mask, index = batch["mask"], batch["masked_index"]
        if self.config.objective in ("all", "all_unmasked"):
            index = torch.arange(mask.numel(), dtype=torch.int32, device=mask.device)
        if self.config.objective == "all_unmasked":
            mask = torch.zeros_like(mask)
        return patches, mask, index

    @torch.no_grad()
    def _tokens(self, batch: dict[str, Tensor], index: Tensor | None = None) -> Tensor:
        """Visual tokens of the second view, (B, Gh, Gw), or with an index (I,) those listed.

        Those of a token cache are in the batch.
        """
        if "tokens" not in batch:
            return visual_tokens(self.tokenizer, batch["token_images"], index)
        tokens = batch["tokens"].long()
        if index is None:
            return tokens.view(-1, *self.config.model.grid)
        return tokens.flatten()[index.clamp(min=0).long()].masked_fill(index < 0, -1)

    @torch.no_grad()
    @_with_tokenizer
    def evaluate(self, model: BeitForMaskedImageModeling, num_batches: int = 8) -> dict[str, float]:
        """Loss and accuracy without drop path, on crops and masks that training never saw.

        With a token cache and no tokenizer, on the cache's crops, which training saw, under masks
        that it never did: `evaluated_on` says which.

        `marginal_entropy` is that of the very tokens that were to be predicted: the loss of a
        model that knows how frequent each token is, and nothing of the image.
        """
        losses, num_correct, num_predicted, counts = [], 0, 0, 0
        for batch in self._unseen(model, num_batches):
            patches, mask, index = self._inputs(batch)
            if not self.predicts_tokens:
                losses.append(model.pixel_loss(patches, mask, index))
                continue
            tokens = self._tokens(batch, index)
            loss, correct = model.loss(patches, mask, index, tokens)
            predicted = tokens[index >= 0]
            losses.append(loss)
            num_correct, num_predicted = num_correct + correct, num_predicted + len(predicted)
            counts = counts + count_codes(predicted, self.config.model.vocab_size)
        result = {"loss": float(torch.stack(losses).mean())}
        if self.predicts_tokens:
            result["accuracy"] = float(num_correct) / max(1, num_predicted)
            result["marginal_entropy"] = float(code_entropy(counts))
        return result

    @property
    def evaluated_on(self) -> str:
        """What `evaluate` and `picture` look at, for whoever reads their results."""
        if self._unseen_loader is self.loader and self.cache is not None:
            return "crops of the token cache, seen in training, and masks never trained on"
        return "crops and masks never trained on"

    @torch.no_grad()
    @_with_tokenizer
    def picture(self, model: BeitForMaskedImageModeling, path: Path) -> None:
        """Original, what the model sees, its tokens decoded, and its predictions decoded.

        With a token cache and no tokenizer, tokens are shown as a colour for each.
        """
        (batch,) = self._unseen(model, 1)
        batch = {name: value[:NUM_PICTURES] for name, value in batch.items()}
        patches, mask, _ = self._inputs(batch | {"masked_index": batch["masked_index"][:0]})
        grid = self.config.model.grid
        original = batch["images"].permute(0, 3, 1, 2).float() / 255
        columns = {"image": original, "what the model sees": hide_patches(original, mask, grid)}
        if not self.predicts_tokens:
            columns["predicted pixels"] = self._predicted_pixels(model, patches, mask, original)
        else:
            tokens = self._tokens(batch).flatten(1)
            predicted = torch.where(mask, model.predict(patches, mask), tokens)
            columns["its visual tokens"] = self._show(tokens.view(-1, *grid))
            columns["with predicted tokens"] = self._show(predicted.view(-1, *grid))
        draw_columns(columns, path)

    def _unseen(
        self, model: BeitForMaskedImageModeling, num_batches: int
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of no training step, on the model's device and jittered, while the model is in
        eval mode."""
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        try:
            batches = unseen_batches(self._unseen_loader, num_batches, device)
            for batch in heeded(batches, "while evaluating"):
                yield jitter_views(batch)
        finally:
            model.train(was_training)

    def _show(self, tokens: Tensor) -> Tensor:
        """Tokens (B, Gh, Gw) as images (B, 3, height, width): decoded, or a colour for each."""
        if self.tokenizer is not None:
            return self.tokenizer.decode(tokens)
        generator = torch.Generator().manual_seed(0)
        colours = torch.rand(self.config.model.vocab_size, 3, generator=generator)
        images = colours.to(tokens.device)[tokens].permute(0, 3, 1, 2)
        return F.interpolate(images, self.config.model.image_pixels, mode="nearest")

    def _check_cache(self) -> None:
        """Raise TokenCacheError unless the cache was made from what this run is made of."""
        made_from = self.cache.manifest.made_from
        if self.config.tokenizer is None:  # nothing to hold the cache's own against
            digest = made_from["tokenizer"]["weights"]
        else:
            digest = tokenizer_digest(load_tokenizer(self.config.tokenizer))
        ours = token_source(self.config, self.loader, digest)
        check_made_from(self.cache.folder, made_from, ours)

    def _predicted_pixels(
        self, model: BeitForMaskedImageModeling, patches: Tensor, mask: Tensor, original: Tensor
    ) -> Tensor:
        """The image with its hidden patches as the model regresses them, (B, 3, h, w)."""
        config = self.config.model
        patches_BPL = model(patches, mask).float().transpose(1, 2)
        pixels = F.fold(
            patches_BPL, config.image_pixels, config.patch_pixels, stride=config.patch_pixels
        )
        mean, std = (
            torch.tensor(v, device=pixels.device).view(3, 1, 1)
            for v in STATISTICS[self.config.statistics]
        )
        visible = hide_patches(original, mask, config.grid, fill=torch.nan)
        return torch.where(visible.isnan(), pixels * std + mean, visible)


def frozen(tokenizer: Tokenizer, config: PretrainConfig) -> Tokenizer:
    """A dVAE in the form that only encodes; any other tokenizer brings its own precision."""
    if isinstance(tokenizer, Dvae):
        return FrozenTokenizer(tokenizer, config.tokenizer_precision)
    return tokenizer


def visual_tokens(tokenizer: Tokenizer, views: Tensor, index: Tensor | None = None) -> Tensor:
    """Tokens of jittered views, uint8 (B, height, width, 3): (B, Gh, Gw), or (I,) of those listed.

    Outside the autocast of a training step.
    """
    with torch.autocast(views.device.type, enabled=False):
        return tokenizer.encode(views.permute(0, 3, 1, 2), index)


def token_source(config: PretrainConfig, loader: Loader, weights: str) -> dict[str, Any]:
    """What the tokens of a run are made from, `weights` being the digest of the tokenizer's."""
    tokenizer = {
        "weights": weights,
        "precision": config.tokenizer_precision,
        "vocab_size": config.model.vocab_size,
    }
    return describe(
        *(loader.source, config.views, config.model.grid, config.run.seed, tokenizer),
        loader.device,
    )


def check_tokenizer(tokenizer: Tokenizer | TokensToCome, config: PretrainConfig) -> None:
    """Raise ValueError unless the tokenizer gives the model one of its codes for each patch."""
    model = config.model
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} codes and the model predicts "
            f"{model.vocab_size}: pass --model.vocab_size {tokenizer.vocab_size}"
        )
    wanted = tuple(side * tokenizer.stride for side in model.grid)
    if config.views.token_size != wanted:
        raise ValueError(
            f"the tokenizer's view is {as_text(config.views.token_size)} px, and one token for "
            f"each of {as_text(model.grid)} patches needs {as_text(wanted)}: pass "
            f"--views.token_size {as_flag(wanted)}"
        )
