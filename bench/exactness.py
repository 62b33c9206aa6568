"""Every kernel at the shape that it has in a training step: is it right, does it give the same bits
twice, how long does it take.

Memory that a kernel should write is full of NaN before it does. Ours and eager PyTorch in the same
dtype are held against fp64 on the same fresh random numbers: ours may err twice as much, plus one
rounding of the largest element. Images are taken a few at a time through eager and fp64, which need
the memory; ours takes them all at once. A step of BEiT-B at 224 px has B = 256, N = 197, H = 12.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from facts import Facts
from peers_attention import attention_costs
from roofline import Machine, Step, works
from timing import Roof, time_interleaved
from tokenizer import random_dvae
from torch import Tensor

from beit_fast.kernels.attention import attention_qkvpacked, attention_reference
from beit_fast.kernels.attention.rel_pos_bias import (
    rel_pos_bias,
    rel_pos_bias_reference,
    relative_position_rows,
)
from beit_fast.kernels.head.gather_rows import gather_rows, gather_rows_reference
from beit_fast.kernels.head.linear_cross_entropy import (
    masked_linear_cross_entropy,
    masked_linear_cross_entropy_reference,
)
from beit_fast.kernels.input.mask_embed import mask_embed, mask_embed_reference
from beit_fast.kernels.input.patches import normalized_patches, normalized_patches_reference
from beit_fast.kernels.philox import keep_mask_reference
from beit_fast.kernels.residual import (
    layer_norm,
    layer_norm_reference,
    scale_residual_norm,
    scale_residual_norm_reference,
    scale_residual_reference,
)
from beit_fast.kernels.residual.drop_path import draw_kept_samples
from beit_fast.model.config import beit_config
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import map_pixels
from beit_fast.tokenizer.frozen import FrozenTokenizer

IMAGES_AT_A_TIME = 16  # of eager and fp64: (16, 12, 197, 197) in fp64 are 60 MB
GRID, N, HIDDEN, V = (14, 14), 197, 75, 8192


@dataclass(frozen=True)
class Place:
    """Where and how large: on a CPU the same work on few images, in fp32."""

    device: torch.device
    roof: Roof
    batch: int
    dtype: torch.dtype

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def normal(self, *shape: int, dtype: torch.dtype | None = None, trained: bool = False):
        values = torch.randn(shape, device=self.device).to(dtype or self.dtype)
        return values.requires_grad_(trained)


def items(place: Place) -> dict[str, Callable[[Facts, str], None]]:
    """What is held against fp64, in order of worth. A function takes where to say it, and how the
    item is called there."""
    B = place.batch
    fewer = max(B // 4, 1)
    return {
        "attention N197": partial(attention, place, B, N, 12, 64),
        "residual D768 fp32": partial(residual, place, 768, torch.float32),
        "head D768": partial(head, place, 768),
        "sequence D768": partial(sequence, place, 768),
        "patches": partial(patches, place),
        "tokenizer": partial(tokenizer, place),
        "bias table": partial(table, place, 12),
        "residual D768 fp32 folded": partial(residual, place, 768, torch.float32, folded=True),
        "residual D768 fp32 dropout": partial(residual, place, 768, torch.float32, drops=True),
        "residual D768 fp32 kept": partial(residual, place, 768, torch.float32, kept=True),
        "residual D768 bf16": partial(residual, place, 768, torch.bfloat16),
        "norm D768": partial(norm, place, 768),
        "gather D768": partial(gather, place, 768),
        "attention N197 dropout": partial(attention, place, fewer, N, 12, 64, dropout_p=0.1),
        "attention N577": partial(attention, place, fewer, 577, 12, 64),
        "attention N197 L": partial(attention, place, B, N, 16, 64),
        "residual D1024 fp32": partial(residual, place, 1024, torch.float32),
        "head D1024": partial(head, place, 1024),
        "attention windows": partial(attention, place, 32 * B, 49, 6, 32),
        "attention N1025 L": partial(attention, place, fewer, 1025, 16, 64),
        "attention K80": partial(attention, place, fewer, 257, 16, 80),
        "attention fp32": partial(
            attention, replace(place, dtype=torch.float32), fewer, N, 12, 64
        ),
    }  # fmt: skip


# --- the rule -------------------------------------------------------------------------------------


class Errors:
    """The largest errors of ours and of eager, over parts of what they give."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
        exact = exact.detach().double()
        found = [(t.detach().double() - exact).abs().amax() for t in (ours, eager)]
        values = [float(v) for v in (*found, exact.abs().amax())] if exact.numel() else [0.0] * 3
        # max() would lose a NaN that comes second: a comparison with it is never true.
        before = self._found.get(name, [0.0] * 3)
        self._found[name] = [
            v if v != v or v > b else b for v, b in zip(values, before, strict=True)
        ]
        self._dtypes[name] = ours.dtype

    def say(self, facts: Facts, item: str) -> None:
        for name, (error, theirs, largest) in self._found.items():
            rounding = torch.finfo(self._dtypes[name]).eps * largest
            facts.check(item, f"error of {name}", error, 2 * theirs + rounding)


@contextmanager
def deterministic(poisoned: bool) -> Iterator[None]:
    """Libraries choose algorithms that give the same bits; `poisoned`: NaN, or the largest integer,
    is in all memory that torch allocates and does not write."""
    fills = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    fills.fill_uninitialized_memory = poisoned
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        fills.fill_uninitialized_memory = before[1]


def twice(facts: Facts, item: str, run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """What `run` gives with poisoned memory, after saying whether it gives the same bits again."""
    with deterministic(poisoned=True):
        first = run()
    with deterministic(poisoned=False):
        again = run()
    different = sum(not torch.equal(a, b) for a, b in zip(first, again, strict=True))
    facts.check(item, "tensors that differ the second time", different, 0)
    return first


def milliseconds(
    facts: Facts, place: Place, item: str, runs: dict[str, tuple[Callable[[], object], float]]
) -> None:
    """`runs` is name -> (call, its least time in ms)."""
    timings = time_interleaved(
        {name: run for name, (run, *_) in runs.items()},
        device=place.device,
        rounds=9 if place.is_cuda else 1,
        calls=10 if place.is_cuda else 1,
    )
    for name, timing in timings.items():
        more = {"floor": runs[name][1], "spread": timing.spread}
        facts.figure(item, name, timing.median_ms, "ms", **more)


def exactly(leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values in fp64, trained where these are."""
    return [
        t.detach().double().requires_grad_(t.requires_grad)
        if t is not None and t.is_floating_point()
        else t
        for t in leaves
    ]


# --- the kernels ----------------------------------------------------------------------------------


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, dropout_p: float = 0.0, rng: Tensor | None
) -> Tensor:
    """What is written by hand: products in the inputs' dtype, scores and softmax in fp32. (The
    reference multiplies in fp32, whatever its inputs.)"""
    q_BHNK, k_BHNK, v_BHNK = (t.transpose(1, 2) for t in (q, k, v))
    logits_BHNN = q.shape[-1] ** -0.5 * (q_BHNK @ k_BHNK.mT).float() + bias
    weights_BHNN = logits_BHNN.softmax(dim=-1)
    if dropout_p:
        B, H, N, _ = weights_BHNN.shape
        streams = torch.arange(B * H, device=q.device)
        keep = keep_mask_reference(rng, dropout_p, N, N, streams).view(B, H, N, N)
        weights_BHNN = weights_BHNN * keep / (1 - dropout_p)
    return (weights_BHNN.to(q.dtype) @ v_BHNK).transpose(1, 2)


def attention(
    place: Place, B: int, N: int, H: int, K: int, facts: Facts, item: str, dropout_p: float = 0.0
) -> None:
    """Packed q, k, v and a bias that all images share, trained."""
    qkv, bias = place.normal(B, N, 3, H, K, trained=True), place.normal(H, N, N, dtype=torch.float)
    bias.requires_grad_()
    dout = place.normal(B, N, H, K)
    rng = torch.tensor([7, 11], device=place.device) if dropout_p else None
    options = {"dropout_p": dropout_p, "rng": rng}

    def both() -> tuple[Tensor, ...]:
        out = attention_qkvpacked(qkv, bias, **options)
        return out, *torch.autograd.grad(out, (qkv, bias), dout)

    out, dqkv, dbias = twice(facts, item, both)
    errors, sums = Errors(), {}
    # Which scores drop out depends on where an image is in the batch: all at once, or none drop.
    at_a_time = B if dropout_p else IMAGES_AT_A_TIME
    for part in range(0, B, at_a_time):
        piece, here = slice(part, part + at_a_time), []
        for dtype, function in (
            (place.dtype, eager_attention),
            (torch.float64, attention_reference),
        ):
            q = qkv[piece].detach().to(dtype).requires_grad_()
            b = bias.detach().to(torch.promote_types(dtype, torch.float)).requires_grad_()
            want = function(*q.unbind(2), b, **options)
            dq, db = torch.autograd.grad(want, (q, b), dout[piece].to(dtype))
            here.append((want, dq))
            sums[dtype] = sums.get(dtype, 0) + db
        (eager, deager), (exact, dexact) = here
        errors.add("out", out[piece], eager, exact)
        for i, name in enumerate(("dq", "dk", "dv")):
            errors.add(name, dqkv[piece, :, i], deager[:, :, i], dexact[:, :, i])
    errors.add("dbias", dbias, sums[place.dtype], sums[torch.float64])
    errors.say(facts, item)

    kept = attention_qkvpacked(qkv, bias, **options)
    still = attention_qkvpacked(qkv, bias.detach(), **options)
    calls = {
        "forward": torch.no_grad()(lambda: attention_qkvpacked(qkv, bias, **options)),
        "backward": lambda: torch.autograd.grad(kept, (qkv, bias), dout, retain_graph=True),
        "backward, frozen bias": lambda: torch.autograd.grad(still, qkv, dout, retain_graph=True),
    }
    costs = attention_costs(B, N, H, K, qkv.element_size())
    costs["backward, frozen bias"] = costs.pop("backward-frozen")
    runs = {name: (run, place.roof.floor_ms(*costs[name])) for name, run in calls.items()}
    milliseconds(facts, place, item, runs)


def table(place: Place, H: int, facts: Facts, item: str) -> None:
    """Positions to bias, and the bias's gradient summed into them."""
    rows = relative_position_rows(GRID)
    leaf, dout = (
        place.normal(rows, H, dtype=torch.float, trained=True),
        place.normal(H, N, N, dtype=torch.float),
    )

    def run(function: Callable, leaf: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out = function(leaf, GRID)
        return out, *torch.autograd.grad(out, leaf, dout)

    ours = twice(facts, item, lambda: run(rel_pos_bias, leaf, dout))
    eager = run(rel_pos_bias_reference, leaf, dout)
    exact = run(rel_pos_bias_reference, *exactly([leaf, dout]))
    errors = Errors()
    for name, *three in zip(("bias", "dtable"), ours, eager, exact, strict=True):
        errors.add(name, *three)
    errors.say(facts, item)


def residual(
    place: Place,
    D: int,
    stream: torch.dtype,
    facts: Facts,
    item: str,
    *,
    folded: bool = False,
    drops: bool = False,
    kept: bool = False,
) -> None:
    """x + keep gamma branch and the norm after it; `folded`: gamma and the norm's affine lie in the
    neighbouring weights; `drops`: elements and samples drop out by counter; `kept`: the branch has
    nine samples of ten."""
    B = place.batch
    samples = draw_kept_samples(B, 0.1, place.device) if kept else None
    C = B if samples is None else len(samples.samples)
    x = place.normal(B, N, D, dtype=stream, trained=True)
    branch = place.normal(C, N, D, trained=True)
    vectors = [None] * 3
    if not folded:
        vectors = [place.normal(D, dtype=torch.float, trained=True) for _ in range(3)]
    keep = None
    if not (drops or kept):
        keep = (torch.rand(B, device=place.device) < 0.9) / 0.9
    options = {"kept": samples}
    if drops:
        rng = torch.tensor([5, 3], device=place.device)
        options |= {"dropout_p": 0.1, "drop_path_p": 0.1, "rng": rng}
    douts = [place.normal(B, N, D, dtype=stream), place.normal(B, N, D)]
    inputs = [x, branch, *vectors, keep]

    def run(function: Callable, inputs: Sequence, douts: Sequence, dtype) -> tuple[Tensor, ...]:
        x, branch, gamma, weight, bias, keep = inputs
        out = function(x, branch, weight, bias, gamma, keep, norm_dtype=dtype, **options)
        leaves = [t for t in inputs if t is not None and t.requires_grad]
        return *out, *torch.autograd.grad(out, leaves, douts)

    ours = twice(facts, item, lambda: run(scale_residual_norm, inputs, douts, place.dtype))
    eager = run(_eager_residual_norm, inputs, douts, place.dtype)
    exact = run(scale_residual_norm_reference, exactly(inputs), exactly(douts), torch.float64)
    names = ["out", "norm", "dx", "dbranch"]
    names += [] if folded else ["dgamma", "dweight", "dbias"]
    errors = Errors()
    for name, *three in zip(names, ours, eager, exact, strict=True):
        errors.add(name, *three)
    errors.say(facts, item)

    _, _, gamma, weight, bias, _ = inputs
    leaves = [t for t in inputs if t is not None and t.requires_grad]

    def forward() -> tuple[Tensor, Tensor]:
        more = {"norm_dtype": place.dtype, **options}
        return scale_residual_norm(x, branch, weight, bias, gamma, keep, **more)

    outs = forward()
    # Without gamma nobody asks for the branch again.
    read = branch.nbytes if not folded else 0
    backward = lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)  # noqa: E731
    moved = 2 * x.nbytes + branch.nbytes + outs[1].nbytes
    moved_back = 3 * x.nbytes + outs[1].nbytes + branch.nbytes + read
    passes = {
        "forward": (torch.no_grad()(forward), place.roof.floor_ms(moved, 0)),
        "backward": (backward, place.roof.floor_ms(moved_back, 0)),
    }
    milliseconds(facts, place, item, passes)


def _eager_residual_norm(x, branch, weight, bias, gamma, keep, *, norm_dtype, **options):
    """The reference's sum, and torch's own norm of it in fp32."""
    out = scale_residual_reference(x, branch, gamma, keep, **options)
    ln = F.layer_norm(out.float(), out.shape[2:], weight, bias, 1e-6)
    return out, ln.to(norm_dtype)


def norm(place: Place, D: int, facts: Facts, item: str) -> None:
    """The first norm of the encoder: nothing is added before it."""
    inputs = [place.normal(place.batch, N, D, dtype=torch.float, trained=True)]
    inputs += [place.normal(D, dtype=torch.float, trained=True) for _ in range(2)]
    dout = place.normal(place.batch, N, D)

    def run(function: Callable, inputs: Sequence, dout: Tensor) -> tuple[Tensor, ...]:
        out = function(*inputs, dtype=dout.dtype)
        return out, *torch.autograd.grad(out, inputs, dout)

    ours = twice(facts, item, lambda: run(layer_norm, inputs, dout))
    eager = run(
        lambda x, *affine, dtype: F.layer_norm(x, (D,), *affine, 1e-6).to(dtype), inputs, dout
    )
    exact = run(layer_norm_reference, exactly(inputs), dout.double())
    errors = Errors()
    for name, *three in zip(("out", "dx", "dweight", "dbias"), ours, eager, exact, strict=True):
        errors.add(name, *three)
    errors.say(facts, item)


def head(place: Place, D: int, facts: Facts, item: str) -> None:
    """The loss of the hidden patches, with the encoder's last norm; some of the list is padding."""
    B = place.batch
    x = place.normal(B, N, D, trained=True)
    index = listed(place, B)
    index[-min(40, len(index) // 9) :] = -1
    target = torch.randint(V, index.shape, device=place.device)
    wide = {"dtype": torch.float, "trained": True}
    weight = (place.normal(V, D, dtype=torch.float) / D**0.5).requires_grad_()
    leaves = [x, weight, place.normal(V, **wide), place.normal(D, **wide), place.normal(D, **wide)]

    def run(function: Callable, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x, weight, bias, *norm = leaves
        loss, correct = function(x, index, target, weight, bias, *norm)
        return loss, correct, *torch.autograd.grad(loss, leaves)

    def under_autocast(function: Callable) -> tuple[Tensor, ...]:
        narrow = place.dtype != torch.float32
        with torch.autocast(place.device.type, torch.bfloat16, enabled=narrow):
            return run(function, leaves)

    ours = twice(facts, item, lambda: under_autocast(masked_linear_cross_entropy))
    eager = under_autocast(masked_linear_cross_entropy_reference)
    exact = run(masked_linear_cross_entropy_reference, exactly(leaves))
    names = ("loss", "correct", "dx", "dweight", "dbias", "dnorm weight", "dnorm bias")
    errors = Errors()
    for name, *three in zip(names, ours, eager, exact, strict=True):
        if name == "correct":  # a tie of rounded scores is not wrong
            off = [abs(int(value) - int(three[2])) for value in three[:2]]
            facts.check(item, "rows counted otherwise", off[0], 2 * off[1] + len(index) // 500 + 1)
        elif name == "loss":  # one number: its rounding is what eager's could be, not what it is
            rounding = 2.0**-20 if place.dtype == torch.float32 else 2.0**-8
            wrong = abs(float(three[0]) - float(three[2]))
            facts.check(item, "error of loss", wrong, rounding * abs(float(three[2])))
        else:
            errors.add(name, *three)
    errors.say(facts, item)
    rows, size = len(index), 2 if place.is_cuda else 4
    traffic = size * (rows * (4 * V + 4 * D) + V * D) + 4 * V * D + 2 * x.nbytes
    floor = place.roof.floor_ms(traffic, 6 * rows * D * V)
    both = lambda: under_autocast(masked_linear_cross_entropy)  # noqa: E731
    milliseconds(facts, place, item, {"forward and backward": (both, floor)})


def sequence(place: Place, D: int, facts: Facts, item: str) -> None:
    """Patches, the mask token, [CLS] and positions, into the fp32 stream."""
    B, L = place.batch, N - 1
    wide = {"dtype": torch.float, "trained": True}
    patches_BLD = place.normal(B, L, D, trained=True)
    leaves = [patches_BLD, place.normal(D, **wide), place.normal(D, **wide)]
    pos = place.normal(N, D, **wide)
    mask = torch.rand(B, L, device=place.device).argsort(dim=1) < HIDDEN
    dout = place.normal(B, N, D, dtype=torch.float)

    def run(function: Callable, leaves: Sequence, pos: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out = function(*leaves, mask, pos, dtype=dout.dtype)
        return out, *torch.autograd.grad(out, (*leaves, pos), dout)

    ours = twice(facts, item, lambda: run(mask_embed, leaves, pos, dout))
    eager = run(mask_embed_reference, leaves, pos, dout)
    exact = run(mask_embed_reference, exactly(leaves), *exactly([pos, dout]))
    names = ("out", "dpatches", "dcls", "dmask", "dpositions")
    errors = Errors()
    for name, *three in zip(names, ours, eager, exact, strict=True):
        errors.add(name, *three)
    errors.say(facts, item)
    options = {"dtype": torch.float}
    shown = patches_BLD.nbytes * (L - HIDDEN) // L
    kept = mask_embed(*leaves, mask, **options)
    forward = torch.no_grad()(lambda: mask_embed(*leaves, mask, **options))
    backward = lambda: torch.autograd.grad(kept, leaves, dout, retain_graph=True)  # noqa: E731
    passes = {
        "forward": (forward, place.roof.floor_ms(shown + dout.nbytes, 0)),
        "backward": (backward, place.roof.floor_ms(dout.nbytes + patches_BLD.nbytes, 0)),
    }
    milliseconds(facts, place, item, passes)


def patches(place: Place, facts: Facts, item: str) -> None:
    """uint8 to normalised patches: bit for bit the reference."""
    half, shape = (0.5, 0.5, 0.5), (place.batch, 224, 224, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=place.device)
    args = (images, (16, 16), half, half)
    (out,) = twice(facts, item, lambda: (normalized_patches(*args, dtype=place.dtype),))
    want = normalized_patches_reference(*args, dtype=place.dtype)
    facts.check(item, "values that are not the reference's", int((out != want).sum()), 0)
    floor = place.roof.floor_ms(images.nbytes + out.nbytes, 0)
    run = lambda: normalized_patches(*args, dtype=place.dtype)  # noqa: E731
    milliseconds(facts, place, item, {"forward": (run, floor)})


def gather(place: Place, D: int, facts: Facts, item: str) -> None:
    """Listed rows alone, as the last block takes them."""
    x = place.normal(place.batch, N, D, dtype=torch.float, trained=True)
    index = listed(place, place.batch)
    dout = place.normal(len(index), D, dtype=torch.float)

    def run(function: Callable, x: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out = function(x, index)
        return out, *torch.autograd.grad(out, x, dout)

    ours = twice(facts, item, lambda: run(gather_rows, x, dout))
    for name, a, b in zip(("out", "dx"), ours, run(gather_rows_reference, x, dout), strict=True):
        facts.check(item, f"values of {name} that are not the reference's", int((a != b).sum()), 0)


def tokenizer(place: Place, facts: Facts, item: str) -> None:
    """DALL-E's encoder with random weights, in fp16 on every back end; features and tokens of few
    images against fp32 without TF32, the time of a batch with as many scores as BEiT hides."""
    config = DvaeConfig(decoder_width=4, decoder_input_width=1)
    size, few = (112, 4) if place.is_cuda else (32, 2)
    if not place.is_cuda:
        config = replace(config, encoder_width=32)
    shape = (place.batch, size, size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=place.device)
    images = images.permute(0, 3, 1, 2)
    dvae = random_dvae(images[:few], config).eval().requires_grad_(False)
    exact = FrozenTokenizer(dvae, "fp32")
    wanted = exact.features(images[:few]).double()
    ids = exact.encode(images[:few])
    with torch.no_grad(), torch.autocast(place.device.type, torch.float16):
        eager = dvae.encoder.features(map_pixels(images[:few])).permute(0, 2, 3, 1)
        changed = float((dvae.encoder(map_pixels(images[:few])).argmax(1) != ids).double().mean())
    model = beit_config("beit_base_patch16_224_8k_vocab", img_size=2 * size)
    step = Step(config=model, batch=place.batch, tokenizer=config, savings=True)
    machine = Machine.of(place.roof)
    floor = sum(w.floor_ms(machine) for w in works(step) if w.stage == "tokenizer")
    positions = torch.randperm(images[:, 0].numel() // 64, device=place.device)
    index = positions[: step.masked].sort().values.int()
    runs = {}
    for backend in ("triton", "cudnn") if place.is_cuda else ("onednn", "torch"):
        frozen = FrozenTokenizer(dvae, "fp16", backend=backend)
        (features,) = twice(facts, item, lambda f=frozen: (f.features(images[:few]),))
        errors = Errors()
        errors.add(f"features, {backend}", features, eager, wanted)
        errors.say(facts, item)
        ours = float((frozen.encode(images[:few]) != ids).double().mean())
        allowed = 2 * changed + 1 / ids.numel()
        facts.check(item, f"share of tokens that change, {backend}", ours, allowed)
        runs[f"encode, {backend}"] = (lambda f=frozen: f.encode(images, index), floor)
    milliseconds(facts, place, item, runs)


def listed(place: Place, B: int) -> Tensor:
    """Rows b N + 1 + l of as many hidden patches as BEiT hides in each image, ascending."""
    hidden = torch.rand(B, N - 1, device=place.device).argsort(dim=1)[:, :HIDDEN].sort(dim=1).values
    return (torch.arange(B, device=place.device)[:, None] * N + 1 + hidden).flatten().int()
