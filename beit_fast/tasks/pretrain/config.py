"""What pre-training depends on, a tokenizer's training, and the tokens written for it."""

from dataclasses import dataclass, field, replace
from typing import Literal

from beit_fast.checks import Count, Filled, Positive, check_fields
from beit_fast.data.config import MAX_VOCAB, DataConfig, MaskingConfig
from beit_fast.data.views.config import SingleViewConfig, ViewConfig
from beit_fast.flags import flag, flags_of
from beit_fast.model.config import BeitConfig
from beit_fast.tasks.read_limits import within
from beit_fast.tokenizer.config import STRIDE, CosineSchedule, DvaeConfig
from beit_fast.train.config import OptimConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class DvaeTrainingConfig:
    """Everything the training of a tokenizer depends on; schedules count optimiser steps."""

    dvae: DvaeConfig = field(default_factory=DvaeConfig)
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    view: SingleViewConfig = field(default_factory=SingleViewConfig)
    beta: CosineSchedule = field(  # weight of the KL term
        default_factory=lambda: CosineSchedule(start=0.0, end=6.6, num_steps=5_000)
    )
    temperature: CosineSchedule = field(
        default_factory=lambda: CosineSchedule(start=1.0, end=1 / 16, num_steps=150_000)
    )
    # random: as DALL-E. kmeans: as clusters of the untrained encoder's features, for short runs.
    codebook_init: Literal["random", "kmeans"] = "random"
    encoder_lr_scale: Positive = 1.0  # the encoder's learning rate, as a multiple of optim.lr

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "data", within(self.run, self.data))
        if self.view.size % STRIDE:
            raise ValueError(
                f"{flag('view.size')} is {self.view.size} px: the dVAE needs a multiple of "
                f"{STRIDE} px"
            )
        if self.run.precision == "fp8":
            raise ValueError(
                f"{flag('run.precision')} is fp8, which convolutions do not have: pass bf16"
            )
        for name in ("start", "end"):
            if not (value := getattr(self.temperature, name)) > 0:
                raise ValueError(
                    f"{flag(f'temperature.{name}')} is {value}: scores are divided by the "
                    "temperature, give a number above 0"
                )


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
    tokenizer: Filled | None = None  # safetensors file; `beit-fast convert-dalle` writes DALL-E's
    # Train one first, in the run's folder; on the same images unless it names others.
    tokenizer_training: DvaeTrainingConfig | None = None
    # Of a dVAE's convolutions; scores are fp32's in all. fp16 is the fast one on GPUs.
    tokenizer_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    # Folder that `beit-fast pretokenize` wrote with these very settings: training then needs no
    # tokenizer. One given besides is for evaluation and pictures, on crops that no step sees.
    token_cache: Filled | None = None
    # Less memory: blocks are computed again in the backward pass, or with "selective" all of them
    # but products and attention.
    grad_checkpointing: bool | Literal["selective"] = False
    # Of the relative-position tables; false is the original's disable_weight_decay_on_rel_pos_bias.
    weight_decay_on_rel_pos_bias: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "data", within(self.run, self.data))
        if (stage := self.tokenizer_training) is not None:  # this run's limit holds in it too
            with flags_of("tokenizer_training", {"run.timeout"}):
                stage = replace(stage, data=within(self.run, stage.data))
            object.__setattr__(self, "tokenizer_training", stage)
        sources = (self.tokenizer is not None) + (self.tokenizer_training is not None)
        if self.token_cache is not None:
            if self.model.predict == "pixels" or self.tokenizer_training is not None:
                raise ValueError(
                    f"--token_cache {self.token_cache} holds the tokens of a trained tokenizer, "
                    "for a model that predicts tokens: pass null for it, or "
                    "--tokenizer_training null (and for evaluation --tokenizer FILE, the one that "
                    "made them) and --model.predict tokens"
                )
        elif self.model.predict == "tokens" and sources != 1:
            raise ValueError(
                "give one of --tokenizer (a file, written by `beit-fast convert-dalle` or "
                "`beit-fast tokenizer`) and --tokenizer_training, and null for the other; or a "
                "--token_cache, written by `beit-fast pretokenize`"
            )
        if self.model.predict == "pixels" and sources:
            raise ValueError(
                "a model that predicts pixels uses no tokenizer: pass null for --tokenizer and "
                "--tokenizer_training"
            )
        size = self.model.image_pixels
        if self.views.size != size:
            raise ValueError(
                f"the views are {as_text(self.views.size)} px and the model takes {as_text(size)}: "
                f"pass --views.size {as_flag(size)}"
            )


@dataclass(frozen=True, kw_only=True)
class PretokenizeConfig(PretrainConfig):
    """The configuration of the runs that will read the tokens, and where to write them.

    Of the run, data, views, tokenizer, the model's grid and the seed count; the rest may differ.
    """

    output: Filled  # folder of the token cache
    num_views: Count = 10  # K, of every image; more can be added later
    # In one file, 28 MB of 14 x 14 tokens; what a kill costs a rank.
    images_per_shard: Count = 65536

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.predict == "pixels" or self.token_cache is not None:
            raise ValueError(
                "tokens are made by a tokenizer, for a model that predicts them: pass "
                "--model.predict tokens, --token_cache null and a tokenizer"
            )
        if self.model.vocab_size > MAX_VOCAB:
            raise ValueError(
                f"{self.model.vocab_size} codes do not fit the cache's 16 bits: at most {MAX_VOCAB}"
            )


def as_text(sides: tuple[int, int]) -> str:
    """(height, width) as messages have it: 224x224."""
    return f"{sides[0]}x{sides[1]}"


def as_flag(sides: tuple[int, int]) -> str:
    """(height, width) as it is typed: 224, or [224,192]."""
    return str(sides[0]) if sides[0] == sides[1] else f"[{sides[0]},{sides[1]}]"
