"""Masked image modelling: predict the visual tokens of hidden patches (BEiT section 2).

tokens = tokenizer(second view)                              no gradient
loss   = mean over hidden patches of -log p(tokens | first view with hidden patches replaced)
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor

from beit_fast.data.color_jitter import jitter_views
from beit_fast.data.masking import MaskingConfig
from beit_fast.data.samples import PretrainSample
from beit_fast.data.views import (
    HALF_MEAN,
    HALF_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ViewConfig,
    normalize,
)
from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForMaskedImageModeling
from beit_fast.tasks.dvae import DvaeTrainingConfig
from beit_fast.tasks.sources import DataConfig, open_loader, unseen_batches
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.tokenizer.frozen import FrozenTokenizer
from beit_fast.tokenizer.metrics import code_entropy, count_codes
from beit_fast.tokenizer.protocol import Tokenizer
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.parallel import World
from beit_fast.viz.reconstruction import draw_columns, hide_patches

STATISTICS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": (HALF_MEAN, HALF_STD)}
NUM_PICTURES = 8


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything a pre-training run depends on."""

    model: BeitConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    statistics: Literal["half", "imagenet"] = "half"  # mean and std of the first view
    # Patches to predict: BEiT's hidden ones, or as ablations (paper, Table 4) all of them, from the
    # masked or from the whole image. model.predict "pixels" is the table's other ablation.
    objective: Literal["masked", "all", "all_unmasked"] = "masked"
    tokenizer: str | None = None  # safetensors file; `beit-fast convert-dalle` writes DALL-E's
    # Train one first, in the run's folder; on the same images unless it names others.
    tokenizer_training: DvaeTrainingConfig | None = None
    # Of a dVAE's convolutions; scores are fp32's in all. fp16 is the fast one on GPUs.
    tokenizer_precision: Literal["fp32", "fp16", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        sources = (self.tokenizer is not None) + (self.tokenizer_training is not None)
        if self.model.predict == "tokens" and sources != 1:
            raise ValueError(
                "give one of tokenizer (a file, written by `beit-fast convert-dalle` or "
                "`beit-fast tokenizer`) and tokenizer_training, and null for the other"
            )
        if self.model.predict == "pixels" and sources:
            raise ValueError(
                "a model that predicts pixels uses no tokenizer: pass null for tokenizer and "
                "tokenizer_training"
            )
        size = self.model.image_pixels
        if self.views.size != size:
            raise ValueError(
                f"the views are {_by(self.views.size)} px and the model takes {_by(size)}: pass "
                f"--views.size {_flag(size)}"
            )


class PretrainTask:
    """BEiT's pre-training as a task of the loop."""

    name = "pretrain"

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer | None, world: World) -> None:
        model, views = config.model, config.views
        if tokenizer is not None:
            _check_tokenizer(tokenizer, config)
        if isinstance(tokenizer, Dvae):  # any other brings its own precision
            tokenizer = FrozenTokenizer(tokenizer, config.tokenizer_precision)
        self.config, self.tokenizer = config, tokenizer
        torch.manual_seed(config.run.seed)
        self.model = BeitForMaskedImageModeling(model)
        self.counters = {}
        if tokenizer is not None:
            self.counters["token_counts"] = torch.zeros(model.vocab_size, dtype=torch.float64)
        self.loader = open_loader(
            config.data,
            PretrainSample(views, config.masking, model.grid),
            seed=config.run.seed,
            world=world,
        )
        self.batches_per_epoch = self.loader.batches_per_epoch
        self.num_images = len(self.loader.source)
        self.images_per_batch = config.data.batch_size

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        if self.tokenizer is not None:
            self.tokenizer.to(device)
        self.counters = {name: counter.to(device) for name, counter in self.counters.items()}

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        return self.loader.batches(start)

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        del step  # nothing here changes over the run
        batch = jitter_views(batch)
        images, mask, index = self._inputs(batch)
        if self.tokenizer is None:
            return self.model.pixel_loss(images, mask, index), {}
        tokens = self._tokens(batch, index)
        loss, num_correct = self.model.loss(images, mask, index, tokens)
        predicted = index >= 0
        # Counts are whole numbers in fp64: exact, so their order of summation does not matter.
        self.counters["token_counts"].index_add_(0, tokens.clamp(min=0), predicted.double())
        return loss, {"accuracy": num_correct / predicted.sum().clamp(min=1)}

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return param_groups_weight_decay(self.model, weight_decay, self.model.no_weight_decay())

    def report(self) -> dict[str, Tensor]:
        if self.tokenizer is None:
            return {}
        return {"marginal_entropy": code_entropy(self.counters["token_counts"])}

    def _inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """First view, mask and the flat indices of the patches to predict, on the device."""
        images = normalize(batch["images"], *STATISTICS[self.config.statistics])
        mask, index = batch["mask"], batch["masked_index"]
        if self.config.objective in ("all", "all_unmasked"):
            index = torch.arange(mask.numel(), dtype=torch.int32, device=mask.device)
        if self.config.objective == "all_unmasked":
            mask = torch.zeros_like(mask)
        return images, mask, index

    @torch.no_grad()
    def _tokens(self, batch: dict[str, Tensor], index: Tensor | None = None) -> Tensor:
        """Visual tokens of the second view, (B, Gh, Gw), or with an index (I,) those listed alone.

        Outside the autocast of the training step.
        """
        views = batch["token_images"].permute(0, 3, 1, 2)
        with torch.autocast(views.device.type, enabled=False):
            return self.tokenizer.encode(views, index)

    @torch.no_grad()
    def evaluate(self, model: BeitForMaskedImageModeling, num_batches: int = 8) -> dict[str, float]:
        """Loss and accuracy without drop path, on crops and masks that training never saw.

        `marginal_entropy` is that of the very tokens that were to be predicted: the loss of a
        model that knows how frequent each token is, and nothing of the image.
        """
        losses, num_correct, num_predicted, counts = [], 0, 0, 0
        for batch in self._unseen(model, num_batches):
            images, mask, index = self._inputs(batch)
            if self.tokenizer is None:
                losses.append(model.pixel_loss(images, mask, index))
                continue
            tokens = self._tokens(batch, index)
            loss, correct = model.loss(images, mask, index, tokens)
            predicted = tokens[index >= 0]
            losses.append(loss)
            num_correct, num_predicted = num_correct + correct, num_predicted + len(predicted)
            counts = counts + count_codes(predicted, self.config.model.vocab_size)
        result = {"loss": float(torch.stack(losses).mean())}
        if self.tokenizer is not None:
            result["accuracy"] = float(num_correct) / max(1, num_predicted)
            result["marginal_entropy"] = float(code_entropy(counts))
        return result

    @torch.no_grad()
    def picture(self, model: BeitForMaskedImageModeling, path: Path) -> None:
        """Original, what the model sees, its tokens decoded, and its predictions decoded."""
        (batch,) = self._unseen(model, 1)
        batch = {name: value[:NUM_PICTURES] for name, value in batch.items()}
        images, mask, _ = self._inputs(batch | {"masked_index": batch["masked_index"][:0]})
        grid = self.config.model.grid
        original = batch["images"].permute(0, 3, 1, 2).float() / 255
        columns = {"image": original, "what the model sees": hide_patches(original, mask, grid)}
        if self.tokenizer is None:
            columns["predicted pixels"] = self._predicted_pixels(model, images, mask, original)
        else:
            tokens = self._tokens(batch).flatten(1)
            predicted = torch.where(mask, model.predict(images, mask), tokens)
            columns["its visual tokens"] = self.tokenizer.decode(tokens.view(-1, *grid))
            columns["with predicted tokens"] = self.tokenizer.decode(predicted.view(-1, *grid))
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
            for batch in unseen_batches(self.loader, num_batches, device):
                yield jitter_views(batch)
        finally:
            model.train(was_training)

    def _predicted_pixels(
        self, model: BeitForMaskedImageModeling, images: Tensor, mask: Tensor, original: Tensor
    ) -> Tensor:
        """The image with its hidden patches as the model regresses them, (B, 3, h, w)."""
        config = self.config.model
        patches_BPL = model(images, mask).float().transpose(1, 2)
        pixels = F.fold(
            patches_BPL, config.image_pixels, config.patch_pixels, stride=config.patch_pixels
        )
        mean, std = (
            torch.tensor(v, device=pixels.device).view(3, 1, 1)
            for v in STATISTICS[self.config.statistics]
        )
        visible = hide_patches(original, mask, config.grid, fill=torch.nan)
        return torch.where(visible.isnan(), pixels * std + mean, visible)


def _check_tokenizer(tokenizer: Tokenizer, config: PretrainConfig) -> None:
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
            f"the tokenizer's view is {_by(config.views.token_size)} px, and one token for each "
            f"of {_by(model.grid)} patches needs {_by(wanted)}: pass --views.token_size "
            f"{_flag(wanted)}"
        )


def _by(sides: tuple[int, int]) -> str:
    return f"{sides[0]}x{sides[1]}"


def _flag(sides: tuple[int, int]) -> str:
    return str(sides[0]) if sides[0] == sides[1] else f"[{sides[0]},{sides[1]}]"
