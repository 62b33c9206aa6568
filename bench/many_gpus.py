"""What many GPUs reach, computed and never measured: a step, the exchange beside it, the images.

    python bench/roofline.py --size base --gpus 8 64 512 [--links 1] [--parallel fsdp]

Bytes      An all-reduce of S bytes among N ranks has each send 2 (N-1)/N S, a gather or a
           reduce-scatter half of it (a ring's count, no algorithm needs less). DDP all-reduces the
           gradients once a step. FSDP gathers all weights for the forward of every micro-batch,
           those of the blocks again for its backward, and reduce-scatters gradients once a step.
           tests/bench/test_many_gpus.py holds the counts against what two ranks send.
Exchange   Inside a node over NVLink, then between nodes, each of a node's links with its share of
           the bytes: one after the other. A bucket or block waits for a tree of hops besides.
Overlap    Buckets of gradients become ready evenly over the backward, blocks of weights are fetched
           one ahead. What of the exchange does not fit beside is added to the step.
Computing  The floors of roofline.py by REACHES, and no kernel below LAUNCH.
Efficiency Images a second, by N times those of one GPU that takes the same step in micro-batches
           of 256.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from roofline import MACHINES, Machine, Step, Work, parameters_of, works

from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.tokenizer.config import DvaeConfig

# Assumed. predictions.json has 0.55 to 0.80 for steps with the tokenizer.
REACHES = 0.65  # of the floor
LAUNCH = 5e-6  # seconds a kernel, without CUDA graphs
LINK_REACHES = 0.8  # of NVLink's and the links' stated rates
HOP = 10e-6  # seconds from node to node
IMAGE_BYTES = 110e3  # a JPEG of ImageNet
CORES = 12  # for each GPU
IMAGES_PER_CORE = 848  # a second: measured on an AMD EPYC, bench/results/data.csv
# A second, whatever the cores: 257 us of each image are one thread's at a time, on that machine, by
# bench/data.py --only lock. Threads that wait for one another make it less.
IMAGES_PER_PROCESS = 3_890
# Stated: bytes a second in one direction, of a GPU to the others of its node, and of 400 Gb/s.
NVLINK = {"A100": 300e9, "H100": 450e9, "H200": 450e9}
LINK = 50e9
GPUS_PER_NODE = 8
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once
IMAGENET_1K, IMAGENET_22K = 1_281_167, 14_197_122
STEP_IMAGES = 2048  # of the recipes
GPU_IMAGES = 256  # of a micro-batch, where there are enough
NUM_BYTES = {"fp32": 4, "bf16": 2}


SAID = (
    f"computed, not measured: {REACHES:g} of the floor's rate and {LINK_REACHES:g} of the links' "
    "assumed; bf16, the tokenizer in the step"
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`links`: of 400 Gb/s, out of each node. `nvlink`: bytes a second, one direction."""

    gpus: int
    nvlink: float
    links: int = 8

    @property
    def per_node(self) -> int:
        return min(self.gpus, GPUS_PER_NODE)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // GPUS_PER_NODE)

    def gather_seconds(self, num_bytes: float) -> float:
        """Of `num_bytes` in shards to every rank, or back; an all-reduce is both."""
        inside = share_sent(self.per_node) * num_bytes / self.nvlink
        between = share_sent(self.nodes) * num_bytes / self.links / LINK
        return (inside + between) / LINK_REACHES + math.ceil(math.log2(self.nodes)) * HOP


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What ranks send. Weights are fp32; `block_parameters` are those of all blocks together."""

    parallel: str  # ddp, fsdp
    num_parameters: int
    block_parameters: int
    num_blocks: int
    gradient_bytes: int = 4
    micro_batches: int = 1

    def bytes_sent(self, ranks: int) -> float:
        """By each rank, in a step."""
        gradients = self.gradient_bytes * self.num_parameters
        if self.parallel == "ddp":
            return 2 * share_sent(ranks) * gradients
        weights = 4 * (self.num_parameters + self.block_parameters)
        return share_sent(ranks) * (weights * self.micro_batches + gradients)

    def seconds(self, cluster: Cluster, forward: float, backward: float) -> tuple[float, float]:
        """All of a step's exchange, and what of it no computing hides.

        forward, backward: seconds of a micro-batch's blocks.
        """
        gradients = self.gradient_bytes * self.num_parameters
        if self.parallel == "ddp":
            pieces = max(1, round(gradients / BUCKET))
            piece = 2 * cluster.gather_seconds(gradients / pieces)
            return pieces * piece, hidden_but(backward, pieces, piece)
        pieces = self.num_blocks
        once = cluster.gather_seconds(4 * self.num_parameters / pieces)
        again = cluster.gather_seconds(4 * self.block_parameters / pieces)
        scatter = cluster.gather_seconds(gradients / pieces)
        shown = self.micro_batches * hidden_but(forward, pieces, once)
        shown += (self.micro_batches - 1) * hidden_but(backward, pieces, again)
        shown += hidden_but(backward, pieces, again + scatter)
        return pieces * ((once + again) * self.micro_batches + scatter), shown


def share_sent(ranks: int) -> float:
    """Of a tensor that is gathered or reduce-scattered, the share that each rank sends."""
    return (ranks - 1) / ranks


def hidden_but(computing: float, pieces: int, piece: float) -> float:
    """What `computing` seconds in `pieces` leave of an exchange of so many pieces.

    Each is sent once it is ready, one after the other; the last has nothing to hide behind.
    """
    return piece + (pieces - 1) * max(0.0, piece - computing / pieces)


@functools.cache
def computing_seconds(step: Step, machine: Machine, ranks: int = 1) -> dict[str, float]:
    """By stage of a micro-batch, at the rate assumed; the optimiser has 1/ranks of the weights."""

    def seconds(work: Work) -> float:
        share = ranks if work.stage == "optimiser" else 1
        return max(work.floor_ms(machine) / 1e3 / REACHES / share, LAUNCH)

    found: dict[str, float] = {}
    for work in works(step):
        found[work.stage] = found.get(work.stage, 0.0) + seconds(work)
    return found


def in_step(stages: dict[str, float], micro_batches: int) -> float:
    """Seconds of a step: the optimiser is at work once."""
    return micro_batches * sum(stages.values()) - (micro_batches - 1) * stages["optimiser"]


def split(gpus: int, step_images: int) -> tuple[int, int]:
    """Images of a micro-batch on one GPU, and micro-batches. Raises ValueError for broken ones."""
    per_gpu, rest = divmod(step_images, gpus)
    micro_batches = -(-per_gpu // GPU_IMAGES) if per_gpu else 0
    if rest or not per_gpu or per_gpu % micro_batches:
        raise ValueError(
            f"{step_images} images a step cannot be split evenly over {gpus} GPUs in micro-batches "
            f"of at most {GPU_IMAGES}: give numbers of GPUs that divide it"
        )
    if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        raise ValueError(f"{gpus} GPUs are no whole nodes of {GPUS_PER_NODE}: give a multiple")
    return per_gpu // micro_batches, micro_batches


def row(
    size: str,
    gpus: int,
    *,
    machine: str = "H100",
    step_images: int = STEP_IMAGES,
    links: int = 8,
    parallel: str = "ddp",
    gradients: str = "fp32",
) -> dict[str, float | str]:
    """A run of so many GPUs, its tokenizer in the step, in bf16. Raises ValueError as `split`."""
    images, micro_batches = split(gpus, step_images)
    config = config_of(size)
    step = Step(config=config, batch=images, tokenizer=DvaeConfig())
    at = MACHINES[machine]
    cluster = Cluster(gpus=gpus, nvlink=NVLINK[machine], links=links)
    exchange = Exchange(
        parallel=parallel,
        num_parameters=num_parameters(size),
        block_parameters=num_parameters(size, blocks=True),
        num_blocks=config.depth,
        gradient_bytes=NUM_BYTES[gradients],
        micro_batches=micro_batches,
    )
    stages = computing_seconds(step, at, gpus if parallel == "fsdp" else 1)
    computing = in_step(stages, micro_batches)
    exchanged = shown = 0.0
    if gpus > 1:
        exchanged, shown = exchange.seconds(cluster, stages["encoder forward"], stages["backward"])
    reading = images * micro_batches / min(CORES * IMAGES_PER_CORE, IMAGES_PER_PROCESS)
    seconds = max(computing + shown, reading)
    rate = step_images / seconds
    full, times = split(1, step_images)
    alone = in_step(computing_seconds(replace(step, batch=full), at), times) / gpus
    losses = {
        "computing": 0.03 * seconds,  # below this nothing else counts
        "small batches": computing - alone,
        "exchange": shown,
        "images": seconds - computing - shown,
    }
    return {
        "model": size,
        "GPUs": gpus,
        "images a GPU": f"{micro_batches} x {images}" if micro_batches > 1 else str(images),
        "computing, ms": 1e3 * computing,
        "exchange, ms": 1e3 * exchanged,
        "of it shown, ms": 1e3 * shown,
        "step, ms": 1e3 * seconds,
        "images/s": rate,
        "efficiency": alone / seconds,
        "lost to": max(losses, key=losses.get),
        "sent a GPU, MB": exchange.bytes_sent(gpus) / 1e6,
        "JPEG, MB/s a node": rate / cluster.nodes * IMAGE_BYTES / 1e6,
        "cores a GPU": rate / gpus / IMAGES_PER_CORE,
        "300 epochs 1K, h": 300 * IMAGENET_1K / rate / 3600,
        "800 epochs 1K, h": 800 * IMAGENET_1K / rate / 3600,
        "150 epochs 22K, h": 150 * IMAGENET_22K / rate / 3600,
    }


def num_parameters(size: str, blocks: bool = False) -> int:
    """Of a model with its head, or of its blocks alone."""
    return parameters_of(config_of(size), blocks)


def config_of(size: str) -> BeitConfig:
    return beit_config(f"beit_{size}_patch16_224_8k_vocab")


def rows(
    sizes: Sequence[str], gpus: Iterable[int], **options: object
) -> list[dict[str, float | str]]:
    """Of each model and number of GPUs; `options` are those of `row`."""
    return [row(size, number, **options) for size in sizes for number in gpus]


def memory(size: str, ranks: int, parallel: str, micro_batches: int = 1) -> dict[str, float]:
    """Bytes on each rank that the batch does not change: fp32 weights, gradients, two moments.

    FSDP keeps whole gradients between micro-batches.
    """
    whole = 4 * num_parameters(size)
    part = whole / ranks if parallel == "fsdp" else whole
    return {
        "weights": part,
        "gradients": part if micro_batches == 1 else whole,
        "moments": 2 * part,
    }


# --- the table of docs/distributed.md ------------------------------------------------------------

VARIANTS = {
    "DDP": {},
    "DDP, gradients in bf16": {"gradients": "bf16"},
    "FSDP": {"parallel": "fsdp"},
    "DDP, one link a node": {"links": 1},
    "DDP, one link a node, gradients in bf16": {"links": 1, "gradients": "bf16"},
    "FSDP, one link a node": {"links": 1, "parallel": "fsdp"},
}
WEAK_VARIANTS = ("DDP", "DDP, one link a node")  # as many images a GPU: all hide their exchange
PAGE_SIZES, PAGE_GPUS = {"base": "B", "large": "L"}, (8, 64, 512)


def many_gpus_table(_: object = None) -> str:
    """Markdown. Of no results: all of it is computed."""
    lines = [
        f"Computed, not measured: H100, {STEP_IMAGES} images a step, DDP, eight links a node.",
        "",
        "| model, GPUs | images a GPU | step, ms | images/s | efficiency | lost to | 300, 800 "
        "epochs of 1K, h | 150 of 22K, h | JPEG, GB/s a node | cores a GPU |",
        "| --- " * 10 + "|",
    ]
    for size, letter in PAGE_SIZES.items():
        for gpus in PAGE_GPUS:
            r = row(size, gpus)
            lost = "" if r["lost to"] == "computing" else r["lost to"]
            hours = [r[f"{e} epochs {n}, h"] for e, n in ((300, "1K"), (800, "1K"), (150, "22K"))]
            cells = [
                f"{letter}, {gpus}",
                r["images a GPU"],
                f"{r['step, ms']:.1f}",
                f"{r['images/s']:,.0f}",
                f"{100 * r['efficiency']:.0f} %",
                lost,
                f"{hours[0]:.1f}, {hours[1]:.1f}",
                f"{hours[2]:.1f}",
                f"{r['JPEG, MB/s a node'] / 1e3:.2f}",
                f"{r['cores a GPU']:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    heads = [f"{letter}, {gpus}" for letter in PAGE_SIZES.values() for gpus in PAGE_GPUS]
    lines += [
        "",
        "Efficiency, computed:",
        "",
        f"| images a step | exchange | {' | '.join(heads)} |",
        "| --- " * (len(heads) + 2) + "|",
    ]
    for weak in (False, True):
        for name, options in VARIANTS.items():
            if weak and name not in WEAK_VARIANTS:
                continue
            cells = []
            for size in PAGE_SIZES:
                for gpus in PAGE_GPUS:
                    images = GPU_IMAGES * gpus if weak else STEP_IMAGES
                    efficiency = row(size, gpus, step_images=images, **options)["efficiency"]
                    cells.append(f"{100 * efficiency:.0f} %")
            images = f"{GPU_IMAGES} a GPU" if weak else str(STEP_IMAGES)
            lines.append(f"| {images} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(_: object = None) -> str:
    """Markdown: GB on each rank that no batch changes."""
    lines = [
        "| model | parameters, M | DDP | FSDP, 8 ranks | FSDP, 64 ranks | a checkpoint |",
        "| --- " * 6 + "|",
    ]
    for size in ("small", "base", "large"):
        number = num_parameters(size)
        cases = [("ddp", 8), ("fsdp", 8), ("fsdp", 64)]
        held = [sum(memory(size, ranks, kind).values()) for kind, ranks in cases]
        cells = [f"{value / 1e9:.2f}" for value in (*held, 12 * number)]
        lines.append(f"| {size[0].upper()} | {number / 1e6:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)
