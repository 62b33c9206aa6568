"""The head of masked image modelling and the tokenizer's arg-max: ours, and what a user can pick.

The peers get rows gathered and normed by torch, with a fixed number of rows as ours, or with
"eager-all" the head over every position, as transformers has it. Under autocast on a GPU: weights
in fp32, x and products in bf16. "ours-2048" has twice the default rows of logits at a time.
Operations are those of the products: 2 R D V forward, three times that with the backward.
Bytes: rows read once a pass, compact rows and gradients written and read once, x's gradient, the
weight and its gradient; logits count nothing, they are to stay in the L2 cache.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels._triton import can_launch
from beit_fast.kernels.head.gather_norm import gather_norm, gather_norm_torch
from beit_fast.kernels.head.linear_argmax import linear_argmax
from beit_fast.kernels.head.linear_cross_entropy import masked_linear_cross_entropy
from beit_fast.kernels.head.scatter_norm import scatter_norm_backward, scatter_norm_backward_torch
from kernels import Case, require_as_exact, try_all

EPS = 1e-6
N, MASKED, V = 197, 75, 8192
CUDA_SHAPES = ((256, 768, V), (256, 1024, V))
CPU_SHAPES = ((4, 192, 1024), (4, 768, V))
PASSES = ("forward", "both")
FEATURES = 2048  # channels that DALL-E's encoder scores


def cases(device: torch.device, dtype: torch.dtype, only: str) -> Iterator[Case]:
    """Evaluation, and forward with backward; the two streaming kernels; the arg-max."""
    is_cuda = device.type == "cuda"
    for B, D, classes in CUDA_SHAPES if is_cuda else CPU_SHAPES:
        name = f"B{B}-D{D}-V{classes}"
        passes = [part for part in PASSES if only in f"{name}-{part}"]
        if passes:
            inputs = _inputs(B, D, classes, dtype, device)
            peers = _peers(device, dtype)
            check = functools.partial(_check, peers, inputs)
            for part in passes:
                candidates, failed = try_all(
                    {peer: _bind(part, run, inputs) for peer, run in peers.items()}
                )
                num_bytes, num_flops = _counts(part, inputs)
                yield Case(
                    f"{name}-{part}", candidates, num_bytes, num_flops, failed=failed, check=check
                )
        if is_cuda:
            yield from _streaming_cases(name, _inputs(B, D, classes, dtype, device), dtype, only)
    B, D = (256, FEATURES) if is_cuda else (2, 256)
    for part in ("all", "masked"):
        if only in (name := f"argmax-B{B}-D{D}-{part}"):
            yield _argmax_case(name, B, D, part == "masked", device)


def _inputs(B, D, classes, dtype, device) -> tuple[Tensor, ...]:
    """x, index, target; weight, bias, norm weight, norm bias. x and the last four are trained."""
    x = torch.randn(B, N, D, device=device).to(dtype)
    hidden = torch.rand(B, N - 1, device=device).argsort(dim=1)[:, :MASKED].sort(dim=1).values
    index = (torch.arange(B, device=device)[:, None] * N + 1 + hidden).flatten().int()
    target = torch.randint(classes, index.shape, device=device)
    weight = torch.randn(classes, D, device=device) / D**0.5
    vectors = [torch.randn(size, device=device) for size in (classes, D, D)]
    leaves = [t.detach().requires_grad_() for t in (x, weight, *vectors)]
    return leaves[0], index, target, *leaves[1:]


def _counts(part: str, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    x, index, _, weight, *_ = inputs
    rows = len(index) * x.shape[2] * x.element_size()
    flops = 2 * len(index) * weight.numel()
    if part == "forward":
        return 2 * rows + weight.numel() * x.element_size(), flops
    return 4 * rows + x.nbytes + weight.numel() * (x.element_size() + 4), 3 * flops


def _eager(x, index, target, weight, bias, norm_weight, norm_bias):
    """Gathered rows, all of their logits."""
    rows = x.flatten(0, 1).index_select(0, index)
    rows = F.layer_norm(rows, rows.shape[1:], norm_weight, norm_bias, EPS)
    logits = F.linear(rows, weight, bias)
    return F.cross_entropy(logits.float(), target), (logits.argmax(dim=-1) == target).sum()


def _eager_all(x, index, target, weight, bias, norm_weight, norm_bias):
    """The head at every position, the rows that count taken from its logits."""
    rows = F.layer_norm(x, x.shape[2:], norm_weight, norm_bias, EPS)
    logits = F.linear(rows, weight, bias).flatten(0, 1).index_select(0, index)
    return F.cross_entropy(logits.float(), target), (logits.argmax(dim=-1) == target).sum()


def _rows(x, index, norm_weight, norm_bias, dtype):
    rows = x.flatten(0, 1).index_select(0, index)
    return F.layer_norm(rows, rows.shape[1:], norm_weight, norm_bias, EPS).to(dtype)


def _liger(x, index, target, weight, bias, norm_weight, norm_bias, *, dtype):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    rows = _rows(x, index, norm_weight, norm_bias, dtype)
    return liger_fused_linear_cross_entropy(rows, weight.to(dtype), target, bias.to(dtype)), None


def _cut_cross_entropy(x, index, target, weight, bias, norm_weight, norm_bias, *, dtype, impl):
    from cut_cross_entropy import linear_cross_entropy

    rows = _rows(x, index, norm_weight, norm_bias, dtype)
    return linear_cross_entropy(rows, weight.to(dtype), target, bias.to(dtype), impl=impl), None


def _quack(x, index, target, weight, bias, norm_weight, norm_bias, *, dtype):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    del bias  # it has none
    rows = _rows(x, index, norm_weight, norm_bias, dtype)
    return chunked_linear_cross_entropy(rows, weight.to(dtype), target, reduction="mean"), None


def _peers(device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    peers = {
        "ours": functools.partial(masked_linear_cross_entropy, norm_eps=EPS),
        "eager": _eager,
        "eager-all": _eager_all,
    }
    if device.type == "cuda":
        peers |= {
            "ours-2048": functools.partial(peers["ours"], chunk_rows=2048),
            "torch": functools.partial(peers["ours"], backend="torch"),
            "compile": torch.compile(_eager, dynamic=False),
            "compile-max": torch.compile(_eager, dynamic=False, mode="max-autotune-no-cudagraphs"),
            "liger": functools.partial(_liger, dtype=dtype),
            "cce": functools.partial(_cut_cross_entropy, dtype=dtype, impl="cce"),
            "cce-exact": functools.partial(_cut_cross_entropy, dtype=dtype, impl="cce_exact"),
            "quack": functools.partial(_quack, dtype=dtype),
        }
    return peers


def _bind(part: str, function: Callable, inputs: tuple[Tensor, ...]) -> Callable:
    """A maker for `try_all`: what it returns is timed."""
    device, is_cuda = inputs[0].device.type, inputs[0].is_cuda
    leaves = [t for t in inputs if t.requires_grad]

    def forward():
        with torch.autocast(device, torch.bfloat16, enabled=is_cuda):
            return function(*inputs)[0]

    def both():
        return torch.autograd.grad(forward(), leaves, allow_unused=True)

    return lambda: torch.no_grad()(forward) if part == "forward" else both


def _check(peers: dict[str, Callable], inputs: tuple[Tensor, ...]) -> None:
    """Ours against the eager head on 256 rows in fp64: no time is printed for wrong numbers."""
    small = (inputs[0], inputs[1][:256], inputs[2][:256], *inputs[3:])

    def run(function, arguments):
        loss = _bind("forward", function, arguments)()()
        gradients = _bind("both", function, arguments)()()
        return [loss, *gradients]

    exact_inputs = [t.detach().double().requires_grad_() if t.requires_grad else t for t in small]
    exact = _eager(*exact_inputs)[0]
    exact = [exact, *torch.autograd.grad(exact, [t for t in exact_inputs if t.requires_grad])]
    ours, theirs = run(peers["ours"], small), run(_eager, small)
    for our, their, want in zip(ours, theirs, exact, strict=True):
        allowed = 2 * (their - want).abs().max() + 1e-6 * want.abs().max()
        error = (our - want).abs().max()
        if not error <= allowed:
            raise SystemExit(f"ours is wrong: error {error:.2e}, allowed {allowed:.2e}")


def _streaming_cases(name, inputs, dtype, only) -> Iterator[Case]:
    """Gather with norm, and the way back, against their own traffic."""
    x, index, _, _, _, norm_weight, norm_bias = (t.detach() for t in inputs)
    if not can_launch(x):
        return
    rows, stats = gather_norm(x, index, norm_weight, norm_bias, EPS, dtype)
    if only in f"{name}-gather":
        run = functools.partial(gather_norm, x, index, norm_weight, norm_bias, EPS, dtype)
        eager = functools.partial(_rows, x, index, norm_weight, norm_bias, dtype)
        num_bytes = 2 * rows.nbytes
        check = functools.partial(_check_streaming, inputs, dtype)
        yield Case(f"{name}-gather", {"ours": run, "eager": eager}, num_bytes, 0.0, check=check)
    if only in f"{name}-scatter":
        run = functools.partial(
            scatter_norm_backward, rows, index, torch.ones(1, device=x.device), x, stats,
            norm_weight, needs_x=True, needs_weight=True, needs_bias=True,
        )  # fmt: skip
        check = functools.partial(_check_streaming, inputs, dtype)
        num_bytes = 2 * rows.nbytes + x.nbytes
        yield Case(f"{name}-scatter", {"ours": run}, num_bytes, 0.0, check=check)


def _check_streaming(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Both kernels on two images against the same in torch, both held against fp64."""
    x, index, _, _, _, *norm = (t.detach() for t in inputs)
    x, index = x[:2], index[index < 2 * N]
    dout = torch.randn(len(index), x.shape[2], device=x.device).to(dtype)
    options = {"needs_x": True, "needs_weight": True, "needs_bias": True}

    def run(gather: Callable, scatter: Callable, x: Tensor, dout: Tensor, norm: list[Tensor]):
        rows, stats = gather(x, index, *norm, EPS, dout.dtype)
        factor = torch.ones(1, device=x.device, dtype=stats.dtype)
        return [rows, *scatter(dout, index, factor, x, stats, norm[0], **options)]

    in_torch = (gather_norm_torch, scatter_norm_backward_torch)
    exact = run(*in_torch, x.double(), dout.double(), [t.double() for t in norm])
    ours = run(gather_norm, scatter_norm_backward, x, dout, norm)
    require_as_exact(ours, run(*in_torch, x, dout, norm), exact)


def _argmax_case(name, B, D, masked, device) -> Case:
    """fp16 features as the tokenizer's convolutions leave them; the floor is fp16's."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    features = torch.randn(B, 14, 14, D, device=device).to(dtype)
    weight, bias = torch.randn(V, D, device=device) / D**0.5, torch.zeros(V, device=device)
    index = torch.arange(B * MASKED, device=device).int() if masked else None

    def eager():
        rows = features if index is None else features.flatten(0, 2).index_select(0, index)
        return F.linear(rows.float(), weight, bias).argmax(dim=-1)

    runs = {
        "ours": functools.partial(linear_argmax, precision="tf32x3"),
        "eager": lambda *_: eager(),
    }
    if device.type == "cuda":
        for precision in ("tf32", "fp16"):
            runs[f"ours-{precision}"] = functools.partial(linear_argmax, precision=precision)
    candidates, failed = try_all(
        {n: (lambda run=run: lambda: run(features, weight, bias, index)) for n, run in runs.items()}
    )
    rows = B * (MASKED if masked else 196)
    num_bytes = rows * D * features.element_size() + weight.nbytes
    check = functools.partial(_check_argmax, features, weight, bias, index)
    return Case(name, candidates, num_bytes, 2.0 * rows * D * V, failed=failed, check=check)


def _check_argmax(features: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None) -> None:
    """What ours picks among the first rows scores as much as the best, but for fp32's rounding."""
    rows = features.flatten(0, 2)
    rows = (rows if index is None else rows.index_select(0, index))[:256].double()
    scores = F.linear(rows, weight.double(), bias.double())
    chosen = linear_argmax(features, weight, bias, index, precision="tf32x3").flatten()[:256]
    gap = (scores.amax(dim=1) - scores.gather(1, chosen[:, None])[:, 0]).max()
    # Sums of D products, in fp32 and in another order than here.
    allowed = torch.finfo(torch.float32).eps * rows.shape[1] ** 0.5 * scores.abs().max()
    if not gap <= allowed:
        raise AssertionError(f"ours picks scores {gap:.2e} below the best: nothing is timed")
