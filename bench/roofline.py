"""The least time of every stage of a pre-training step, from counts and a machine's ceilings.

    python bench/roofline.py [--size base] [--img-size 224] [--batch 256] [--machines A100 H200]
    python bench/roofline.py --machines here --device cpu --dtype fp32 --batch 4
    python bench/roofline.py --size base --gpus 8 64 512      # what many GPUs reach: many_gpus.py

A piece of work is one kernel as this project fuses them: each operand read once, each result
written once. Its floor is the largest of operations / matrix rate, bytes / bandwidth and
exponentials / their rate; a stage's floor is the sum over its work, because kernels run one after
another. Operations are two for a multiplication with its addition. The stream between blocks is
fp32, as autocast leaves it; `--residual bf16` counts half of it. `--savings` leaves out what need
not be computed: beyond the last block's attention all but the hidden patches, scores of visible
patches in the tokenizer, embeddings of hidden patches, and their q, k, v in the first block.

Letters: T = B N tokens, P values in a patch, M hidden patches in the batch, the rest as everywhere.
"""

import argparse
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import Roof, conditions, conditions_line, format_table, measure_roof, write_results

from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.model.heads import BeitForMaskedImageModeling
from beit_fast.tokenizer.config import NUM_GROUPS, DvaeConfig

STAGES = ("input", "tokenizer", "encoder forward", "head", "backward", "optimiser")
PARTIAL_SUMS = 8  # of the bias gradient, (H, N, N) in fp32: written, then read and added


@dataclass(frozen=True)
class Machine:
    """What a machine reaches; `peak_flops` is what its maker states, None where nobody does."""

    flops_per_second: float
    bytes_per_second: float
    exps_per_second: float = float("inf")
    peak_flops: float | None = None

    @classmethod
    def of(cls, roof: Roof, peak_flops: float | None = None) -> "Machine":
        return cls(roof.flops_per_second, roof.bytes_per_second, peak_flops=peak_flops)


# bf16, dense. A100-80GB and H100 SXM by data sheet, H200 as measured (a product of 8192^3 random
# numbers, a copy counted both ways). A multiprocessor makes 16 exponentials a clock.
MACHINES = {
    "A100": Machine(312e12, 2.0e12, 108 * 16 * 1.41e9, 312e12),
    "H100": Machine(989e12, 3.35e12, 132 * 16 * 1.755e9, 989e12),
    "H200": Machine(788e12, 4.3e12, 132 * 16 * 1.755e9, 989e12),
}


@dataclass(frozen=True)
class Work:
    """One kernel, run once. `repeated_flops` are those of `num_flops` that recompute something."""

    stage: str
    name: str
    num_flops: float = 0.0
    num_bytes: float = 0.0
    num_exps: float = 0.0
    repeated_flops: float = 0.0

    def seconds(self, machine: Machine) -> dict[str, float]:
        """By what it could be bound."""
        return {
            "products": self.num_flops / machine.flops_per_second,
            "memory": self.num_bytes / machine.bytes_per_second,
            "exponentials": self.num_exps / machine.exps_per_second,
        }

    def floor_ms(self, machine: Machine) -> float:
        return 1e3 * max(self.seconds(machine).values())


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step to count. `num_masked` is per image, by default 75 of 196 as in BEiT."""

    config: BeitConfig
    batch: int
    num_masked: int | None = None
    tokenizer: DvaeConfig | None = None
    element_bytes: int = 2  # activations and weights at work: 2 in bf16, 4 in fp32
    # The stream between blocks: fp32 under autocast too, for [CLS], which patches join, is fp32.
    residual_bytes: int = 4
    savings: bool = False

    @property
    def masked(self) -> int:
        """M."""
        per_image = self.num_masked
        if per_image is None:
            per_image = round(75 / 196 * self.config.num_patches)
        return self.batch * per_image


def works(step: Step) -> list[Work]:
    """All kernels of a step."""
    tokenizer = _tokenizer(step) if step.tokenizer is not None else ()
    return [*_embedding(step), *tokenizer, *_blocks(step), *_head(step), *_optimizer(step)]


def floors(config: BeitConfig, batch: int, machine: Machine, **options: object) -> dict[str, float]:
    """Milliseconds of each stage at least; `options` are the other fields of Step."""
    floor_ms: dict[str, float] = {}
    for work in works(Step(config=config, batch=batch, **options)):
        floor_ms[work.stage] = floor_ms.get(work.stage, 0.0) + work.floor_ms(machine)
    return {stage: floor_ms[stage] for stage in STAGES if stage in floor_ms}


def model_flops_per_image(config: BeitConfig, num_masked: int | None = None) -> float:
    """Operations of encoder and head, forward and backward, without tokenizer and recomputation.

    Model FLOP utilisation is this by images per second by a rate of products.
    """
    step = Step(config=config, batch=1, num_masked=num_masked)
    return sum(work.num_flops - work.repeated_flops for work in works(step))


# --- the stages -----------------------------------------------------------------------------------


def _embedding(step: Step) -> Iterator[Work]:
    """Pixels to the sequence that enters the first block."""
    config, B, e, r = step.config, step.batch, step.element_bytes, step.residual_bytes
    D, P, T = config.embed_dim, config.patch_dim, B * (config.num_patches + 1)
    patches = B * config.num_patches
    rows = patches - step.masked if step.savings else patches
    yield Work("input", "uint8 to patches", num_bytes=patches * P * (1 + e))
    forward, backward = "encoder forward", "backward"
    yield _product(forward, "patch embedding", rows, P, D, e, extra_bytes=r * T * D)
    yield Work(forward, "first norm", num_bytes=T * D * (r + e))
    yield Work(backward, "first norm", num_bytes=T * D * (e + 3 * r))
    yield _weight_gradient("patch embedding", rows, P, D, e, extra_bytes=r * T * D)


def _blocks(step: Step) -> Iterator[Work]:
    """Every block, forward and backward."""
    config, B, e, r = step.config, step.batch, step.element_bytes, step.residual_bytes
    D, H, K, N = config.embed_dim, config.num_heads, config.head_dim, config.num_patches + 1
    W, F, T = H * K, int(config.mlp_ratio * config.embed_dim), B * N
    scores, pairs = B * H * N * N, H * N * N
    product = 2 * scores * K  # operations of q k^T, and of any product as large
    partials = (2 * PARTIAL_SUMS + 1) * 4 * pairs
    forward, backward = "encoder forward", "backward"
    for block in range(config.depth):
        is_first, is_last = block == 0, block == config.depth - 1
        # Without absolute positions the hidden patches of all images enter as one row.
        saved_qkv = step.masked if step.savings and is_first and not config.use_abs_pos_emb else 0
        qkv_rows = T - max(saved_qkv - 1, 0)
        rows = step.masked if step.savings and is_last else T

        yield _product(forward, "qkv", qkv_rows, D, 3 * W, e)
        num_bytes = 4 * e * T * W + 4 * B * H * N + e * pairs
        yield Work(forward, "attention", 2 * product, num_bytes, scores)
        yield _product(forward, "proj", rows, W, D, e)
        yield _product(forward, "fc1, GELU", rows, D, F, e, extra_bytes=e * rows * F)
        yield _product(forward, "fc2", rows, F, D, e)
        for _ in range(2):  # x and branch in, x and its norm out, statistics in fp32
            num_bytes = rows * D * (2 * e + 2 * r) + 8 * rows
            yield Work(forward, "residual, norm", num_bytes=num_bytes)

        yield _product(backward, "fc2, dGELU", rows, D, F, e, extra_bytes=e * rows * F)
        yield _product(backward, "fc1", rows, F, D, e)
        yield _product(backward, "proj", rows, D, W, e)
        num_bytes = 8 * e * T * W + 8 * B * H * N + e * pairs + partials
        # Five products, the first of which the forward did already.
        yield Work(backward, "attention, dbias", 5 * product, num_bytes, scores, product)
        yield _product(backward, "qkv", qkv_rows, 3 * W, D, e)
        yield _weight_gradient("fc2", rows, F, D, e)
        yield _weight_gradient("fc1", rows, D, F, e)
        yield _weight_gradient("proj", rows, W, D, e)
        yield _weight_gradient("qkv", qkv_rows, D, 3 * W, e)
        for _ in range(2):  # LayerScale's gradient comes from the weights: kernels/residual/fold.py
            num_bytes = rows * D * (2 * e + 3 * r) + 8 * rows
            yield Work(backward, "residual, norm", num_bytes=num_bytes)


def _head(step: Step) -> Iterator[Work]:
    """Norm, scores and loss of the hidden patches, forward and backward, logits in memory."""
    config, M, e, r = step.config, step.masked, step.element_bytes, step.residual_bytes
    D, V, T = config.embed_dim, config.vocab_size, step.batch * (config.num_patches + 1)
    logits = e * M * V
    yield Work("head", "gather, norm", num_bytes=M * D * (r + e))
    yield _product("head", "logits", M, D, V, e)
    yield Work("head", "cross-entropy", num_bytes=2 * logits, num_exps=M * V)
    yield _product("head", "dx", M, V, D, e)
    yield Work("head", "dweight", 2 * M * D * V, logits + 4 * V * D + e * M * D)
    yield Work("head", "norm, scatter", num_bytes=M * D * (e + r) + r * T * D)


def _optimizer(step: Step) -> Iterator[Work]:
    """fp32 weights, gradients and moments: p, g, m, v in, p, m, v out, and a copy in bf16."""
    num_parameters = parameters_of(step.config)
    copy_bytes = 2 if step.element_bytes == 2 else 0
    yield Work("optimiser", "gradient norm", num_bytes=4 * num_parameters)
    yield Work("optimiser", "AdamW", num_bytes=(28 + copy_bytes) * num_parameters)


@functools.cache
def parameters_of(config: BeitConfig, blocks: bool = False) -> int:
    """How many the model with its head has, or its blocks alone."""
    with torch.device("meta"):
        model = BeitForMaskedImageModeling(config)
    module = model.blocks if blocks else model
    return sum(parameter.numel() for parameter in module.parameters())


def _tokenizer(step: Step) -> list[Work]:
    """The dVAE's convolutions by group, each fused with its ReLU, bias and residual; arg-max
    without scores in memory."""
    dvae, B, e = step.tokenizer, step.batch, step.element_bytes
    area = B * step.config.num_patches * 4 ** (NUM_GROUPS - 1)  # positions of the first group
    width, name = dvae.encoder_width, "group 1"
    flops, num_bytes = {name: 2 * area * 49 * 3 * width}, {name: area * (3 + e * width)}
    inputs = width
    for group in range(NUM_GROUPS):
        name = f"group {group + 1}"
        width = dvae.encoder_width * 2**group
        for _ in range(dvae.blocks_per_group):
            hidden = width // 4
            convolutions = [(9, inputs, hidden), (9, hidden, hidden), (9, hidden, hidden)]
            convolutions += [(1, hidden, width)]
            convolutions += [(1, inputs, width)] if inputs != width else []
            for taps, a, b in convolutions:
                flops[name] = flops.get(name, 0) + 2 * area * taps * a * b
                num_bytes[name] = num_bytes.get(name, 0) + e * (area * (a + b) + taps * a * b)
            num_bytes[name] += e * area * width  # the residual
            inputs = width
        if group < NUM_GROUPS - 1:
            num_bytes[name] += e * area * width * 1.25  # pooling: in, and a quarter out
            area //= 4
    rows = step.masked if step.savings else area
    flops["scores, arg-max"] = 2 * rows * width * dvae.vocab_size
    num_bytes["scores, arg-max"] = e * (rows * width + width * dvae.vocab_size)
    return [Work("tokenizer", name, flops[name], num_bytes[name]) for name in flops]


def _product(
    stage: str, name: str, rows: int, inputs: int, outputs: int, e: int, extra_bytes: float = 0.0
) -> Work:
    """(rows, inputs) by (inputs, outputs), all of e bytes; `extra_bytes` of its epilogue."""
    num_bytes = e * (rows * inputs + inputs * outputs + rows * outputs) + extra_bytes
    return Work(stage, name, 2 * rows * inputs * outputs, num_bytes)


def _weight_gradient(
    name: str, rows: int, inputs: int, outputs: int, e: int, extra_bytes: float = 0.0
) -> Work:
    """The gradient of a weight (outputs, inputs), in fp32."""
    num_bytes = e * rows * (inputs + outputs) + 4 * inputs * outputs + extra_bytes
    return Work("backward", f"{name} weight", 2 * rows * inputs * outputs, num_bytes)


# --- the table ------------------------------------------------------------------------------------


def table(step: Step, machines: dict[str, Machine]) -> list[dict]:
    """A row for each kind of work, then one for each stage and one for all; floors in ms."""
    groups: dict[tuple[str, str], list[Work]] = {}
    for work in works(step):
        groups.setdefault((work.stage, work.name), []).append(work)
    order = sorted(groups, key=lambda key: STAGES.index(key[0]))
    rows = [_row(*key, groups[key], step, machines) for key in order]
    for stage in dict.fromkeys(stage for stage, _ in order):
        whole = [work for work in works(step) if work.stage == stage]
        rows.append(_row(stage, "all", whole, step, machines))
    return [*rows, _row("step", "all", works(step), step, machines)]


def _row(
    stage: str, name: str, group: list[Work], step: Step, machines: dict[str, Machine]
) -> dict:
    num_flops, num_bytes = (
        sum(getattr(work, count) for work in group) for count in ("num_flops", "num_bytes")
    )
    row = {
        "stage": stage,
        "work": name,
        "count": len(group),
        "GFLOP/img": num_flops / step.batch / 1e9,
        "MB/img": num_bytes / step.batch / 1e6,
        "FLOP/B": num_flops / num_bytes,
    }
    for machine_name, machine in machines.items():
        row[f"{machine_name} ms"] = sum(work.floor_ms(machine) for work in group)
        seconds = group[0].seconds(machine)
        row[f"{machine_name} bound"] = "" if name == "all" else max(seconds, key=seconds.get)
    return row


def bounds(step: Step, machines: dict[str, Machine]) -> list[dict]:
    """Images a second that no step can exceed, and the model FLOP utilisation that would be."""
    flops = model_flops_per_image(step.config, step.num_masked)
    rows = []
    for name, machine in machines.items():
        ms = sum(work.floor_ms(machine) for work in works(step))
        rate = 1e3 * step.batch / ms
        peak = machine.peak_flops
        rows.append(
            {
                "machine": name,
                "floor ms": ms,
                "images/s at the floor": rate,
                "model GFLOP/img": flops / 1e9,
                "of the products' rate": rate * flops / machine.flops_per_second,
                "of the stated peak": rate * flops / peak if peak else "not stated",
            }
        )
    return rows


def machines_named(names: Iterable[str], device: torch.device, dtype: torch.dtype) -> dict:
    """Those of MACHINES, and `here`, whose ceilings are measured now."""
    return {
        name: Machine.of(measure_roof(device, dtype)) if name == "here" else MACHINES[name]
        for name in names
    }


def print_many_gpus(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """A table a machine."""
    import many_gpus  # which is made of the counts above

    if "here" in options.machines:
        parser.error(f"--gpus knows the links of {', '.join(MACHINES)}: give --machines of these")
    for machine in options.machines:
        names = ("step_images", "links", "parallel", "gradients")
        given = {name: getattr(options, name) for name in names}
        try:
            rows = many_gpus.rows([options.size], options.gpus, machine=machine, **given)
        except ValueError as error:
            parser.error(str(error))
        print(f"{machine}, {many_gpus.SAID}\n{format_table(rows)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=["small", "base", "large"], default="base")
    parser.add_argument("--img-size", type=int, choices=[224, 384, 512], default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokenizer", choices=["live", "none"], default="live")
    parser.add_argument(
        "--machines", nargs="+", choices=[*MACHINES, "here"], default=list(MACHINES)
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument(
        "--residual",
        choices=["fp32", "bf16"],
        default="fp32",
        help="the stream between blocks; default fp32, which it is under autocast",
    )
    parser.add_argument("--savings", action="store_true", help="leave out what need not be done")
    many = parser.add_argument_group("many GPUs, in nodes of eight (many_gpus.py)")
    many.add_argument(
        "--gpus", type=int, nargs="+", help="numbers of them; with --size, --machines"
    )
    many.add_argument("--step-images", type=int, default=2048, help="of all GPUs; default 2048")
    many.add_argument("--links", type=int, default=8, help="of 400 Gb/s, a node; default 8")
    many.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp")
    many.add_argument("--gradients", choices=["fp32", "bf16"], default="fp32", help="as exchanged")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args()

    if options.dtype != "bf16" and options.machines != ["here"]:
        parser.error("A100, H100 and H200 are known in bf16 alone: pass --machines here for fp32")
    if options.gpus:
        print_many_gpus(options, parser)
        return
    num_bytes = {"fp32": 4, "bf16": 2}
    step = Step(
        config=beit_config(f"beit_{options.size}_patch16_{options.img_size}_8k_vocab"),
        batch=options.batch,
        tokenizer=DvaeConfig() if options.tokenizer == "live" else None,
        element_bytes=num_bytes[options.dtype],
        residual_bytes=num_bytes[options.residual],
        savings=options.savings,
    )
    device = torch.device(options.device)
    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    machines = machines_named(options.machines, device, dtype)
    rows = table(step, machines)
    settings = {name: getattr(options, name) for name in ("size", "img_size", "batch", "dtype")}
    values = conditions(device, savings=options.savings, **settings)
    if "here" in options.machines:
        print(conditions_line(values))
    print(format_table(rows))
    print(f"\n{format_table(bounds(step, machines))}")
    if options.csv is not None:
        write_results(options.csv, rows, values)
    if options.json is not None:
        options.json.write_text(json.dumps({"conditions": values, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
