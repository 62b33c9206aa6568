"""The tokenizer alone: images a second, share of the machine's roof, and which tokens it changes.

    python bench/tokenizer.py speed|agreement [--tokenizer FILE.safetensors] [--images 8]

Images are crops of the package's photographs, 112 px. Without a file the dVAE has DALL-E's widths
and random weights, each code's scores centred; `beit-fast tokenizer demo` trains a small one.

speed        each candidate in turns with eager, whose time by its own is the speedup, as many
             positions scored as BEiT masks (75 of 196); those marked "all" score every position.
             "eager" is what the reference does: weights cast at each call, scores in fp32 (which
             cuDNN takes for TF32, unless told not to; on a CPU everything), logits stored, arg-max.
             floor is the larger of operations / matrix rate and bytes / copy bandwidth, both
             measured in the same run; a convolution's bytes are input, output and residual once.
agreement    share of tokens equal to those of eager fp32 for each precision, and for the
             reference's own mixed precision; fp32 is fp32 here, without TF32. On a CPU products of
             rounded numbers are summed in fp32, as on a GPU.

Results are written after each candidate, with `--only` too (records.py has the rule). On a GPU
"compile, channels last, all" searches kernels for 37 convolutions, five minutes or more as
estimated; `--only eager ours Dvae` leaves it out and takes 2.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from records import Records
from timing import (
    RESULTS,
    Roof,
    Timing,
    conditions,
    conditions_line,
    failed_row,
    format_results,
    format_table,
    fresh_compiler,
    measure_roof,
    reason_of,
    time_interleaved,
)
from torch import Tensor

from beit_fast.data.config import PHOTOGRAPHS
from beit_fast.data.sources.decode import decode_pillow
from beit_fast.data.views.config import SingleViewConfig
from beit_fast.data.views.single_view import crop_view
from beit_fast.kernels.exact_fp32 import exact_fp32
from beit_fast.kernels.head.linear_argmax import linear_argmax
from beit_fast.tasks.sources import open_source
from beit_fast.tokenizer.checkpoint import load_tokenizer
from beit_fast.tokenizer.config import DvaeConfig, dvae_config
from beit_fast.tokenizer.dvae import Conv, Dvae, map_pixels
from beit_fast.tokenizer.frozen import PRECISIONS, FrozenTokenizer

MASKED_SHARE = 75 / 196


def eager(dvae: Dvae, images: Tensor, dtype: torch.dtype) -> Tensor:
    """dall_e's encoder and BEiT's arg-max: autocast casts the weights, the last product is fp32."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return dvae.encoder(map_pixels(images)).argmax(dim=1)


def agreement(dvae: Dvae, images: Tensor) -> Iterator[dict]:
    """One row for each precision: share of tokens equal to eager fp32's, in percent."""
    with exact_fp32():
        yield from _agreement(dvae, images)


def _agreement(dvae: Dvae, images: Tensor) -> Iterator[dict]:
    exact = eager(dvae, images, torch.float32)

    def row(name: str, scores: str, ids: Tensor) -> dict:
        changed = (ids != exact).sum().item()
        share = f"{100 * (1 - changed / max(1, exact.numel())):.2f}"
        return {"convolutions": name, "scores": scores, "changed": changed, "equal_%": share}

    yield row("reference's fp16", "fp32", eager(dvae, images, torch.float16))
    for precision, (_, scores) in PRECISIONS.items():
        frozen = FrozenTokenizer(dvae, precision)
        features = frozen.features(images)
        output = dvae.encoder.blocks["output"]["conv"]
        for other in dict.fromkeys((scores, "fp32", "tf32", "fp16", "bf16")):
            ids = linear_argmax(features, output.w.flatten(1), output.b, precision=other)
            yield row(f"ours {precision}", other + " (chosen)" * (other == scores), ids)


def speed(dvae: Dvae, images: Tensor, roof: Roof, rounds: int, names: list[str]) -> Iterator[dict]:
    """One row for the yardstick, and for each candidate whose name contains one of `names`.

    One that cannot run has nan for figures, and the reason.
    """
    device = images.device
    h, w = (side // dvae.stride for side in images.shape[2:])
    positions = len(images) * h * w
    listed = int(positions * MASKED_SHARE)
    index = torch.randperm(positions, device=device)[:listed].sort().values.int()
    makers = _candidates(dvae, images, index)
    yardstick, *others = makers
    run_yardstick = makers[yardstick]()
    floor_ms = _floor_ms(dvae, images, listed, roof)

    def row(name: str, timing: Timing, theirs: Timing) -> dict:
        speedup, spread = timing.ratio(theirs)
        return {
            "candidate": name,
            "ms": timing.median_ms,
            "spread": timing.spread,
            "images/s": 1e3 * len(images) / timing.median_ms,
            "speedup": speedup,
            "speedup_spread": spread,
            "floor_ms": floor_ms,
            "floor": floor_ms / timing.median_ms,
            "error": "",
        }

    options = {"device": device, "rounds": rounds, "warmup": 1}
    timing = time_interleaved({yardstick: run_yardstick}, **options)[yardstick]
    yield (first := row(yardstick, timing, timing))
    for name in others:
        if not any(part in name for part in names):
            continue
        fresh_compiler()
        try:
            pair = {yardstick: run_yardstick, name: makers[name]()}
            timings = time_interleaved(pair, **options)
        except Exception as error:  # a peer that cannot run must not stop the others
            yield failed_row(first, reason_of(error), candidate=name, floor_ms=floor_ms)
        else:
            yield row(name, timings[name], timings[yardstick])


def _candidates(dvae: Dvae, images: Tensor, index: Tensor) -> dict[str, Callable[[], Callable]]:
    """What to time, by name, made only where it is asked for; the first is the yardstick."""
    is_cuda = images.device.type == "cuda"
    dtype = torch.float16 if is_cuda else torch.float32
    standard = Dvae(dvae.config).to(images.device)
    standard.load_state_dict(dvae.state_dict())
    contiguous = standard.eval().requires_grad_(False)  # as the reference keeps its weights
    no_grad = torch.no_grad()

    def encode(options: dict) -> Callable:
        frozen = FrozenTokenizer(dvae, **options)
        print(f"{options}: {_counted(frozen.backends())}")
        return lambda: frozen.encode(images, index)

    def compiled() -> Callable:
        mode = "max-autotune" if is_cuda else "default"
        run = torch.compile(lambda x: eager(dvae, x, dtype), mode=mode, dynamic=False)
        return no_grad(lambda: run(images))

    def under_autocast() -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=is_cuda):
            return dvae.encode(images, index)

    makers = {
        "eager, all": lambda: no_grad(lambda: eager(contiguous, images, dtype)),
        "eager, channels last, all": lambda: no_grad(lambda: eager(dvae, images, dtype)),
        "compile, channels last, all": compiled,
        "Dvae.encode": lambda: under_autocast,
    }
    backends = (None, "triton", "cudnn") if is_cuda else (None, "torch")
    for precision in ("fp16", "bf16", "fp32") if is_cuda else ("fp32", "bf16"):
        for backend in backends:
            options = {"precision": precision, "backend": backend}
            name = f"ours {precision}" + f", {backend}" * (backend is not None)
            makers[name] = lambda options=options: encode(options)
    return makers


def _counted(backends: dict[str, str]) -> str:
    names = list(backends.values())
    return ", ".join(f"{names.count(name)} convolutions by {name}" for name in dict.fromkeys(names))


def _floor_ms(dvae: Dvae, images: Tensor, listed: int, roof: Roof) -> float:
    """The sum over convolutions of the larger of their two floors, 16-bit on CUDA."""
    size = 2 if images.device.type == "cuda" else 4
    pixels = {g: images[:, 0].numel() >> 2 * (g - 1) for g in range(1, 5)}
    total = 0.0
    for name, layer in dvae.encoder.named_modules():
        if not isinstance(layer, Conv):
            continue
        _, part, *_ = name.split(".")
        D, C, k, _ = layer.w.shape
        at = listed if part == "output" else pixels[int(part[-1]) if part != "input" else 1]
        moved = at * size * (C + (0 if part == "output" else D * (2 if "conv_4" in name else 1)))
        total += roof.floor_ms(moved + layer.w.numel() * size, 2 * k * k * C * D * at)
    return total


@torch.no_grad()
def random_dvae(images: Tensor, config: DvaeConfig | None = None) -> Dvae:
    """DALL-E's shape with random weights, no code winning everywhere on these images."""
    torch.manual_seed(0)
    dvae = Dvae(config or dvae_config("dvae_8192")).to(
        images.device, memory_format=torch.channels_last
    )
    output = dvae.encoder.blocks["output"]["conv"]
    features_BC = dvae.encoder.features(map_pixels(images)).mean(dim=(2, 3))
    output.b -= F.linear(features_BC.mean(dim=0), output.w.flatten(1))
    return dvae


def load_images(num_images: int, size: int = 112) -> Tensor:
    """(B, 3, size, size) uint8, channels last in memory."""
    source = open_source(PHOTOGRAPHS)
    views = [
        crop_view(
            np.asarray(decode_pillow(source.read(i % len(source)))),
            SingleViewConfig(size=size),
            random.Random(i),
        )
        for i in range(num_images)
    ]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "agreement"))
    parser.add_argument("--tokenizer", help="safetensors file; random weights if not given")
    parser.add_argument("--images", type=int, help="default 256 on CUDA, 4 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=[""], help="candidates by a part of the name")
    parser.add_argument("--output", type=Path, help="CSV; default in results/, by what and device")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.what == "agreement" and arguments.only != [""]:
        parser.error("--only names candidates of speed: agreement has all precisions in one run")
    num_images = arguments.images or (256 if device.type == "cuda" else 4)
    images = load_images(num_images).to(device)
    dvae = load_tokenizer(arguments.tokenizer, device) if arguments.tokenizer else None
    dvae = (dvae or random_dvae(images)).eval().requires_grad_(False)
    weights = f"{dvae.config.encoder_width} wide, {'trained' if arguments.tokenizer else 'random'}"
    settings = {"tokenizer": weights, "images": num_images}
    if arguments.what == "agreement":
        names = ("convolutions", "scores")
        made = agreement(dvae, images)
    else:
        roof = measure_roof(device, torch.float16 if device.type == "cuda" else torch.float32)
        settings["rounds"] = arguments.rounds
        settings["copy_GB_per_s"] = round(roof.bytes_per_second / 1e9)
        settings["product_TFLOP_per_s"] = round(roof.flops_per_second / 1e12, 2)
        names = ("candidate",)
        made = speed(dvae, images, roof, arguments.rounds, arguments.only)
    values = conditions(device, ["triton"], **settings)
    print(conditions_line(values))
    origin = "trained" if arguments.tokenizer else "random"
    path = arguments.output or RESULTS / f"tokenizer-{arguments.what}-{origin}-{device.type}.csv"
    records, rows = Records(path, values, names), []
    for row in made:
        records.add([row])
        rows.append(row)
        print(", ".join(map(str, row.values())), flush=True)
    table = format_table(rows) if "error" not in rows[0] else format_results(rows, "candidate")
    print(f"\n{table}\nwritten to {path}")


if __name__ == "__main__":
    main()
