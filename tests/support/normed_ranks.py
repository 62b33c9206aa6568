"""A small net with batch norm, trained by the ranks that torchrun starts, or by this process alone:
`normed_ranks.py OUTPUT`."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from beit_fast.data.run_images import RunImages
from beit_fast.train.batch_norm import synchronize_batch_norm
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.loop import train
from beit_fast.train.world import World, open_world
from beit_fast_main import _end_rank
from loaded import Numbers


class NormedTask:
    """Numbers by convolution, batch norm, ReLU. What `images` images are in a batch follows from
    the batch's number alone, however many ranks share it: rank r has the r-th part."""

    name = "normed"
    num_images = 48

    def __init__(self, world: World, images: int) -> None:
        self.world, self.images_per_batch = world, images // world.size
        self.batches_per_epoch = self.num_images // images
        self.images = RunImages(Numbers(self.num_images))
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3)
        )
        with torch.no_grad():
            model[1].weight.uniform_(0.5, 1.5)
        self.model = synchronize_batch_norm(model, world)
        self.counters: dict[str, Tensor] = {}
        self.blocks = ()

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    def batches(self, start: int):
        number = start
        while True:
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(self.images_per_batch * self.world.size, 2, 6, 7, generator=generator)
            x = x * torch.linspace(0.5, 3, len(x)).view(-1, 1, 1, 1) + 2  # ranks differ
            yield {"x": x.chunk(self.world.size)[self.world.rank]}
            number += 1

    def begin_step(self, step: int) -> None: ...

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"]
        return (self.model(x) - x[:, :1, 2:-2, 2:-2]).square().mean(), {}

    def param_groups(self, weight_decay: float) -> list[dict]:
        return [{"params": list(self.model.parameters()), "weight_decay": weight_decay}]

    def count(self, batch: dict[str, Tensor]) -> None:
        return None

    def report(self, counters: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def picture(self, model: nn.Module, path: Path) -> None:
        path.write_bytes(b"png")


def train_normed(output: Path, world: World, images: int, accumulate: int) -> None:
    run = RunConfig(
        output=str(output), steps=12, precision="fp32", device="cpu", log_every=1, ema_decay=0.8,
        accumulate=accumulate,
    )  # fmt: skip
    optim = OptimConfig(lr=1e-2, warmup_steps=2)
    train(NormedTask(world, images), optim, run, settings={}, world=world)


def main(output: Path) -> int:
    torch.set_num_threads(1)
    with open_world("cpu") as world:
        train_normed(output / "whole", world, 4, accumulate=1)
        train_normed(output / "accumulated", world, 4, accumulate=2)
        task = NormedTask(world, 4)
        norm = task.model[1]
        pixel = torch.tensor([1.0, -2.0, 30.0, 0.5]).view(1, 4, 1, 1) * (1 + world.rank)
        said = {"one_pixel": norm(pixel), "in_bf16": norm(pixel.bfloat16())}
        said |= norm.state_dict() | {"evaluated": norm.eval()(pixel)}
        torch.save({k: v.detach() for k, v in said.items()}, output / f"norm_{world.rank}.pt")
    return 0


if __name__ == "__main__":
    _end_rank(main(Path(sys.argv[1])))
