"""How many visual tokens change with the precision of the tokenizer's scores.

    python bench/argmax_agreement.py [--tokenizer FILE.safetensors] [--images 8]

Tokens of the package's photographs, scored from the same features in each precision of
`linear_argmax`, against fp32: the share that is equal, and the share where convolutions in fp16
come before. Without a file, a dVAE of DALL-E's widths with random weights, each code's scores
centred; a trained one decides more clearly. On a GPU the kernels multiply; on a CPU operands are
rounded first, which is the same but for the order of sums.
"""

import argparse
import random

import numpy as np
import torch
from timing import conditions, conditions_line, format_table

from beit_fast.data.single_view import SingleViewConfig, single_view
from beit_fast.kernels.linear_argmax import PRECISIONS
from beit_fast.tasks.sources import PHOTOGRAPHS, open_source
from beit_fast.tokenizer.checkpoint import load_tokenizer
from beit_fast.tokenizer.dvae import Dvae, dvae_config


def agreement(dvae: Dvae, images: torch.Tensor) -> list[dict]:
    """One row for each precision: shares of tokens equal to those of fp32, in percent."""
    exact = dvae.encode(images, precision="fp32")
    rows = []
    for precision in PRECISIONS:
        row = {"precision": precision}
        for name, enabled in (("fp32 features, %", False), ("fp16 features, %", True)):
            with torch.autocast(images.device.type, torch.float16, enabled=enabled):
                ids = dvae.encode(images, precision=precision)
            row[name] = f"{100 * (ids == exact).double().mean().item():.2f}"
        rows.append(row)
    return rows


@torch.no_grad()
def random_dvae(images: torch.Tensor) -> Dvae:
    """DALL-E's shape with random weights, no code winning everywhere on these images."""
    torch.manual_seed(0)
    dvae = Dvae(dvae_config("dvae_8192")).to(images.device)
    output = dvae.encoder.blocks["output"]["conv"]
    mapped = images.float() / 255
    features_BC = dvae.encoder.features(mapped).mean(dim=(2, 3))
    output.b -= output.w.flatten(1) @ features_BC.mean(dim=0)
    return dvae


def load_images(num_images: int, size: int = 112) -> torch.Tensor:
    source = open_source(PHOTOGRAPHS)
    views = [
        single_view(source.read(i % len(source)), SingleViewConfig(size=size), random.Random(i))
        for i in range(num_images)
    ]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", help="safetensors file; random weights if not given")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    images = load_images(arguments.images).to(device)
    dvae = load_tokenizer(arguments.tokenizer, device) if arguments.tokenizer else None
    dvae = (dvae or random_dvae(images)).eval()
    weights = arguments.tokenizer or "random"
    settings = {"tokenizer": weights, "tokens": images.shape[0] * 196}
    print(conditions_line(conditions(device, **settings)))
    print(format_table(agreement(dvae, images)))


if __name__ == "__main__":
    main()
