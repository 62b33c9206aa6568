"""What bench/pretrain.py times and what it is fed: settings, our step, candidates, their input."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from data_images import ManyTimes
from peers_pretrain import Batch, Candidate, PreparedSample, build_peer, eager_tokens
from torch import Tensor, nn

from beit_fast.data.config import PHOTOGRAPHS, DataConfig, MaskingConfig
from beit_fast.data.loader import Loader
from beit_fast.data.samples import PretrainSample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.views.config import ViewConfig
from beit_fast.model.config import BeitConfig
from beit_fast.tasks.pretrain.config import PretrainConfig
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tokenizer.config import STRIDE, DvaeConfig
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.graph import graphed, preparation
from beit_fast.train.loop import compile_mode
from beit_fast.train.optim import Schedule, build_optimizer
from beit_fast.train.prefetch import device_batches
from beit_fast.train.sentinel import Sentinel
from beit_fast.train.shares import shares_of
from beit_fast.train.step import TrainStep
from beit_fast.train.task import TaskLoss
from beit_fast.train.world import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that a candidate is built from."""

    model: BeitConfig
    batch: int
    device: str
    dtype: str
    tokenizer: DvaeConfig | None  # None: visual tokens are given
    input: str
    loader_threads: int = 0

    @property
    def tokenizer_name(self) -> str:
        return "none" if self.tokenizer is None else f"dVAE-{self.tokenizer.encoder_width}"

    @property
    def pretrain(self) -> PretrainConfig:
        """The recipe's, for images and a grid of this size; its rate changes next to nothing."""
        model = self.model
        L = model.num_patches
        token_size = tuple(side * STRIDE for side in model.grid)
        return PretrainConfig(
            model=model,
            data=DataConfig(path=PHOTOGRAPHS, batch_size=self.batch),
            # Exactly as many in each image: the same work for all candidates in every batch.
            masking=MaskingConfig(
                strategy="block_exact", num_masked=num_masked(model), min_block=min(16, L // 8)
            ),
            views=ViewConfig(size=model.image_pixels, token_size=token_size),
            optim=OptimConfig(lr=1e-6, min_lr=1e-6, warmup_steps=0),
            run=RunConfig(output="unused", steps=1, precision=self.dtype, device=self.device),
            tokenizer="random weights",
            tokenizer_precision="fp16" if self.device == "cuda" else "fp32",
        )


def num_masked(model: BeitConfig) -> int:
    """75 of 196 patches, and as large a share of other grids."""
    return round(75 / 196 * model.num_patches)


# --- ours: the engine is built here, and nowhere else ---------------------------------------------

# What a run can choose: fields of RunConfig.
OURS = {
    "ours": {},
    "ours-graph": {"cuda_graph": True},
    "ours-reduce-overhead": {"compile": "reduce-overhead"},
    "ours-eager": {"compile": "off"},
}


class Ours:
    """The step of the loop for one process: task, compiler, TrainStep, graph, as `train` has it."""

    def __init__(self, config: PretrainConfig, tokenizer: nn.Module, device: torch.device) -> None:
        optim, run = config.optim, config.run
        self.run, self.device, self.optim = run, device, optim
        self.task = PretrainTask(config, tokenizer, World(0, 1, device))
        self.task.to(device)
        self.task.model.train()
        if (mode := compile_mode(run, device)) != "off":
            self.task.compile(mode)
        groups = self.task.param_groups(optim.weight_decay)
        self.optimizer = build_optimizer(groups, optim, device)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedule = Schedule(self.optimizer, optim, num_steps=2**31, warmup=0, start=0)
        module = TaskLoss(self.task)
        world = World(0, 1, device)
        sentinel = Sentinel(self.optimizer, world, run)
        shares = shares_of(self.task.count, run, world)
        take = TrainStep(
            module, self.optimizer, sentinel, shares=shares, optim=optim, run=run, device=device
        )
        self.take = graphed(take, run, world)
        # Patches and tokens, from a batch on the device.
        self.ready = preparation(self.task, run, device)

    def step(self, batch: Batch) -> Tensor:
        loss = self.take([batch])["loss"]
        self.schedule.step()
        return loss


def build_ours(setting: Setting, **run: object) -> tuple[Candidate, Ours]:
    """The candidate, with fields of RunConfig replaced, and what its stages are measured on."""
    device = torch.device(setting.device)
    config = setting.pretrain
    config = replace(config, run=replace(config.run, **run))
    ours = Ours(config, make_tokenizer(setting), device)
    return Candidate(model=ours.task.model, step=ours.step, ready=ours.ready), ours


# --- candidates and their input -------------------------------------------------------------------


class GivenTokens(nn.Module):
    """A tokenizer that is no work: the same random ids for every batch."""

    stride = STRIDE

    def __init__(self, model: BeitConfig, batch: int) -> None:
        super().__init__()
        self.vocab_size = model.vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.vocab_size, (batch, *model.grid), generator=generator)
        self.register_buffer("ids", ids)

    def encode(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        del images
        if index is None:
            return self.ids
        ids = self.ids.flatten().index_select(0, index.clamp(min=0))
        return torch.where(index >= 0, ids, -1)


def make_tokenizer(setting: Setting) -> nn.Module:
    """A dVAE of random weights, or given tokens."""
    if setting.tokenizer is None:
        return GivenTokens(setting.model, setting.batch)
    torch.manual_seed(0)
    return Dvae(setting.tokenizer).eval()


def encoder_of_width(width: int) -> DvaeConfig:
    """DALL-E's has 256. The decoder, which nothing here runs, is as small as it can be."""
    return DvaeConfig(encoder_width=width, decoder_width=4, decoder_input_width=1)


def build(name: str, setting: Setting) -> Candidate:
    """Ours or a peer, ready to train."""
    if name in OURS:
        return build_ours(setting, **OURS[name])[0]
    device = torch.device(setting.device)
    tokenizer = make_tokenizer(setting).to(device)
    if setting.tokenizer is None:

        def tokenize(views: Tensor) -> Tensor:
            return tokenizer.encode(views).flatten(1)
    else:
        tokenize = partial(eager_tokens, tokenizer, half=device.type == "cuda")
    optim, dtype = setting.pretrain.optim, DTYPES[setting.dtype]
    return build_peer(name, setting.model, tokenize, optim, device, dtype)


def sample_of(setting: Setting, candidate: Candidate) -> PreparedSample:
    """What the candidate's loader makes of a file."""
    config = setting.pretrain
    views = ViewConfig(
        kind=candidate.views, size=config.views.size, token_size=config.views.token_size
    )
    return PreparedSample(views, config.masking, setting.model.grid, candidate.prepare)


def synthetic_batch(setting: Setting) -> Batch:
    """Noise in the loader's layout, on the CPU; masks are drawn as the loader draws them."""
    config, rng = setting.pretrain, np.random.default_rng(0)
    sample = PretrainSample(config.views, config.masking, setting.model.grid)
    samples = []
    for i in range(setting.batch):
        sizes = {"images": config.views.size, "token_images": config.views.token_size}
        made = {n: rng.integers(0, 256, (*size, 3), np.uint8) for n, size in sizes.items()}
        samples.append(made | {"seed": SampleSeed(0, 0, i)})
    return {name: torch.from_numpy(array) for name, array in sample.collate(samples).items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class Input:
    """Batches for one candidate, as the setting says. A loader runs while one is `open`."""

    def __init__(self, setting: Setting, candidate: Candidate, source: "ManyTimes | None") -> None:
        self.setting, self.candidate, self.source = setting, candidate, source
        self.device = torch.device(setting.device)
        if setting.input != "jpeg":
            batch = candidate.prepare(synthetic_batch(setting))
            if self.device.type == "cuda":
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            self.batch = to_device(batch, self.device) if setting.input == "synthetic" else batch

    @contextmanager
    def open(self) -> Iterator[Iterator[Batch]]:
        """What the candidate's step takes; `next` does the work that it takes to get there."""
        with self.raw() as batches:
            if self.setting.input == "synthetic":
                yield map(self.candidate.ready, batches)
            else:
                yield device_batches(batches, self.device, self.candidate.ready)

    @contextmanager
    def raw(self) -> Iterator[Iterator[Batch]]:
        """Batches on the CPU or, synthetic ones, on the device."""
        if self.setting.input != "jpeg":
            yield itertools.repeat(self.batch)
            return
        loader = Loader(
            self.source,
            sample_of(self.setting, self.candidate),
            batch_size=self.setting.batch,
            num_threads=self.setting.loader_threads,
        )
        batches = loader.batches()
        try:
            yield batches
        finally:
            batches.close()
