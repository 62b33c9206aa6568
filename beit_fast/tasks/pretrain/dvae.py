"""Training a tokenizer: the dVAE's relaxed evidence lower bound (DALL-E, appendix A).

loss = -E[ln p(x | z)] + beta KL(q(z | x) || uniform),   z relaxed at temperature tau

Short runs need two things that DALL-E's three million steps do not: codes that start as clusters of
real features, and an encoder that learns more slowly than the decoder. With one high rate for both,
features move faster than codes can follow, and a few codes end up with everything.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_fast.data.samples import TokenizerSample
from beit_fast.tasks.pretrain.config import DvaeTrainingConfig
from beit_fast.tasks.sources import describe_source, open_loader, say, task_settings, unseen_batches
from beit_fast.tokenizer.checkpoint import save_tokenizer
from beit_fast.tokenizer.codebook import place_codes
from beit_fast.tokenizer.config import STRIDE
from beit_fast.tokenizer.dvae import Dvae, most_likely_images
from beit_fast.tokenizer.loss import dvae_loss
from beit_fast.tokenizer.metrics import (
    ReconstructionError,
    codebook_use,
    count_codes,
    describe_codebook,
    reconstruction_error,
)
from beit_fast.train.aside import Aside
from beit_fast.train.changes import changes
from beit_fast.train.log import METRICS, plain_console, read_metrics
from beit_fast.train.loop import train
from beit_fast.train.preflight import check_run
from beit_fast.train.start import open_run
from beit_fast.train.state import CheckpointError, checkpoint_paths, read_manifest
from beit_fast.train.stop import heeded, left_together, stop_signals
from beit_fast.train.world import World
from beit_fast.viz.curves import draw_curves
from beit_fast.viz.reconstruction import draw_columns

TOKENIZER = "tokenizer.safetensors"
NUM_PICTURES = 8
POSITIONS_PER_CODE = 4  # that k-means sees, at least


class DvaeTask:
    """The dVAE as a task of the loop."""

    name = "tokenizer"

    def __init__(self, config: DvaeTrainingConfig, world: World) -> None:
        self.config, self.world = config, world
        torch.manual_seed(config.run.seed)
        # Channels-last convolutions are twice as fast on the CPU and use tensor cores on the GPU.
        self.model = Dvae(config.dvae).to(memory_format=torch.channels_last)
        self.blocks = ()
        self._forward = self.model.forward
        self._temperature, self._beta = torch.ones(()), torch.zeros(())
        self.counters: dict[str, Tensor] = {}
        self.loader = open_loader(
            config.data, TokenizerSample(config.view), seed=config.run.seed, world=world
        )
        self.batches_per_epoch = self.loader.batches_per_epoch
        self.num_images, self.images = len(self.loader.source), self.loader.images
        self.images_per_batch = config.data.batch_size

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self._temperature, self._beta = self._temperature.to(device), self._beta.to(device)
        if self.config.codebook_init == "kmeans":
            self._place_codes(device)

    def _place_codes(self, device: torch.device) -> None:
        """K-means over the first batches: here, for a wide encoder would take minutes on a CPU."""
        positions = self.images_per_batch * (self.config.view.size // STRIDE) ** 2
        num_batches = -(-POSITIONS_PER_CODE * self.model.vocab_size // positions)
        place = "while images were read for the first codes"
        told = closing(heeded(self.batches(0), place))
        with left_together(self.world, place), told as batches:
            images = torch.cat([next(batches)["images"] for _ in range(num_batches)])
        place_codes(self.model, images.to(device).permute(0, 3, 1, 2))

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        return self.loader.batches(start)

    def take_rank(self, world: World) -> None:
        self.loader = self.loader.of_rank(world.rank, world.size)

    def sample_name(self, index: int) -> str:
        return self.loader.source.name(index)

    def compile(self, mode: str, *, by_block: bool = False) -> None:
        """All of the model: there are no blocks to make one by one."""
        self._forward = torch.compile(self.model.forward, fullgraph=True, dynamic=False, mode=mode)

    def begin_step(self, step: int) -> None:
        self._temperature.fill_(self.config.temperature(step))
        self._beta.fill_(self.config.beta(step))

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    def count(self, batch: dict[str, Tensor]) -> None:
        """As many pixels in every batch."""

    def stand_in(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["images"].permute(0, 3, 1, 2)
        output = self._forward(images, self._temperature)
        loss = dvae_loss(output, self._beta)
        with torch.no_grad():
            error = reconstruction_error(images.float() / 255, most_likely_images(output.mu))
            use = codebook_use(count_codes(output.logits.argmax(dim=1), self.model.vocab_size))
        return loss.total, {
            "kl": loss.kl,
            "nats_per_value": loss.reconstruction,
            "mae": error.mae,
            "mse": error.mse,
            "codes_used": use.used,
            "perplexity": use.perplexity,
        }

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [
            {
                "params": list(self.model.encoder.parameters()),
                "weight_decay": weight_decay,
                "lr_scale": self.config.encoder_lr_scale,
            },
            {"params": list(self.model.decoder.parameters()), "weight_decay": weight_decay},
        ]

    def report(self, counters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def reconstruct(self, model: Dvae, num_batches: int = 8) -> tuple[ReconstructionError, Tensor]:
        """Errors on crops that training never saw, and how often each code occurs there: (V,).

        Discrete codes, as BEiT will see them, not the relaxed ones of training.
        """
        errors, counts = [], 0
        for images in self._unseen(model, num_batches):
            ids = model.encode(images)
            errors.append(reconstruction_error(images.float() / 255, model.decode(ids)))
            counts = counts + count_codes(ids, model.vocab_size)
        mae, mse = (torch.stack(values).mean() for values in zip(*errors, strict=True))
        return ReconstructionError(mae, mse), counts

    def evaluate(self, model: Dvae) -> dict[str, float]:
        error, _ = self.reconstruct(model)
        return {"mae": float(error.mae), "mse": float(error.mse)}

    @torch.no_grad()
    def picture(self, model: Dvae, path: Path) -> None:
        """Originals beside what their visual tokens decode to."""
        (images,) = self._unseen(model, 1)
        images = images[:NUM_PICTURES]
        columns = {"image": images.float() / 255, "tokens": model.decode(model.encode(images))}
        draw_columns(columns, path)

    def _unseen(self, model: Dvae, num_batches: int) -> Iterator[Tensor]:
        device = next(model.parameters()).device
        batches = unseen_batches(self.loader, num_batches, device)
        for batch in heeded(batches, "while evaluating"):
            yield batch["images"].permute(0, 3, 1, 2)


def run_dvae(config: DvaeTrainingConfig) -> Path:
    """`train_tokenizer` on the ranks that torchrun started, or on this process alone."""
    with open_run(config, config.run.output) as world, stop_signals():
        return train_tokenizer(config, world)


def finished_tokenizer(config: DvaeTrainingConfig) -> Path | None:
    """The file of a run that is finished under these settings, or None: there is something to do,
    or to say, for `train_tokenizer`.

    What the weights were made from counts, and not the number of ranks or where the images are now.
    """
    output, run = Path(config.run.output), config.run
    paths, file = checkpoint_paths(output), output / TOKENIZER
    if not paths or not file.is_file() or run.resume == "never" or run.resume_from is not None:
        return None
    try:
        manifest = read_manifest(paths[-1])
    except CheckpointError:
        return None
    whole = {**task_settings(config), "optim": asdict(config.optim), "run": asdict(run)}
    theirs, ours = manifest["settings"], json.loads(json.dumps(whole))
    for name in ("num_images", "images_per_batch", "world_size"):  # known once images are read
        ours["run"][name] = theirs.get("run", {}).get(name)
    # Pixels are as many in every batch, and no step is to come that could be skipped.
    for settings in (theirs, ours):
        for name in ("loss_mean", "bad_steps", "spike", "spike_window"):
            settings.get("run", {}).pop(name, None)
    length = manifest.get("schedule", {"num_steps": run.steps})["num_steps"]
    if changes(theirs, ours) or length is None or manifest["step"] < length:
        return None
    return file


def train_tokenizer(config: DvaeTrainingConfig, world: World) -> Path:
    """Train a tokenizer, resuming where it was left, and report what became of its codebook.

    Returns the safetensors file that `load_tokenizer` reads, in the run's folder. Raises ValueError
    (also CheckpointError), OSError, NonFiniteLoss, CaptureError, Interrupted.
    """
    task = DvaeTask(config, world)
    say(f"images of the tokenizer: {describe_source(task.loader.source)}", world)
    settings = task_settings(config)
    check_run(task, config.optim, config.run, settings=settings, world=world)
    outcome = train(task, config.optim, config.run, settings=settings, world=world, config=config)
    output = Path(config.run.output)
    path = output / TOKENIZER
    if world.is_main:
        save_tokenizer(outcome.model, path)
        aside = Aside(world, strict=config.run.strict)
        with aside.work("the tokenizer's report"):
            curve = draw_curves(read_metrics(output / METRICS), output / "curve.png")
            error, counts = task.reconstruct(outcome.model)
            console = plain_console()
            console.print(
                f"tokenizer: absolute error {float(error.mae):.4f}, squared {float(error.mse):.5f} "
                f"on unseen crops (pixels in 0..1); {describe_codebook(counts)}"
            )
            for name, result in (("weights", path), ("curve", curve), ("picture", outcome.picture)):
                console.print(f"  {name:10} {result}")
    world.barrier()
    with stop_signals() as stop:
        stop.leave(world, "after the tokenizer's last step", f"{path} is saved")
    return path
