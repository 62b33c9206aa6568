"""Times every reasonable configuration of the attention kernels, for the tables that choose them.

    python bench/tune.py [--only forward|backward] [--tokens 197]

Needs a GPU. For each shape the candidates run interleaved on the same data; printed are the times,
the table's choice marked, and which line of `kernels/attention/configs.py` (or constant of
`kernels/attention/chunks.py`) the fastest would be. Everything goes to results/tune-<gpu>.json,
after each shape and pass, into the place of what was known of them (records.py has the rule).

All of it compiles for more than an hour; as estimated, not measured, `--tokens 197 --only forward`
takes 1.5 minutes and `--tokens 197 --only backward` 8.
"""

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from records import kept_results
from timing import RESULTS, conditions, conditions_line, time_interleaved, write_whole

from beit_fast.kernels._triton import gpu_of
from beit_fast.kernels.attention import backward_hopper as attention_backward_hopper
from beit_fast.kernels.attention.backward import attention_backward, choose_kernels
from beit_fast.kernels.attention.bias import pad_bias
from beit_fast.kernels.attention.configs import (
    FlashForward,
    GeneralBackward,
    Tile,
    WholeForward,
    forward_config,
    general_config,
)
from beit_fast.kernels.attention.forward import attention_forward

# B, H, N, K: BEiT at 224, 384 and 512 px, large batches of windows, other head widths.
SHAPES = (
    (256, 12, 197, 64),
    (256, 16, 197, 64),
    (64, 12, 577, 64),
    (64, 16, 1025, 64),
    (8192, 3, 49, 32),
    (8192, 6, 64, 64),
    (1024, 12, 144, 64),
    (256, 12, 256, 64),
    (64, 16, 257, 80),
    (64, 16, 257, 96),
    (64, 16, 257, 128),
)


class Inputs:
    """Tensors of one shape in bf16, and calls of the launchers on them."""

    def __init__(self, B: int, H: int, N: int, K: int, device: str = "cuda") -> None:
        def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.q, self.k, self.v = randn(B, N, 3, H, K).unbind(2)
        self.out, self.dout = torch.empty_like(self.q), randn(B, N, H, K)
        self.out = self.out.contiguous()
        self.lse = torch.empty(B, H, N, device=device)
        self.bias = pad_bias(randn(H, N, N, dtype=torch.float32), [], self.q, N, K**-0.5)
        self.gradients = dict(zip(("dq", "dk", "dv"), torch.empty(B, N, 3, H, K,
            dtype=torch.bfloat16, device=device).unbind(2), strict=True))  # fmt: skip
        self.options = {"scale": K**-0.5, "dropout_p": 0.0, "rng": None, "tf32": False}

    def forward(self, config=None) -> None:
        tensors = (self.q, self.k, self.v, self.bias)
        attention_forward(*tensors, out=self.out, lse=self.lse, config=config, **self.options)

    def backward(self, config=None) -> None:
        tensors = (self.dout, self.q, self.k, self.v, self.bias, self.out, self.lse)
        options = {**self.gradients, "trains_bias": True, "config": config, **self.options}
        attention_backward(*tensors, **options)


def forward_candidates(N: int, default: WholeForward | FlashForward) -> Iterator:
    """The default, its variations, and the other kernel's tiles."""
    yield default
    if isinstance(default, WholeForward):
        for maxnreg, num_stages in itertools.product((None, 96, 128, 168), (1, 2)):
            yield replace(default, maxnreg=maxnreg, num_stages=num_stages)
    for block_n, block_m, num_stages in itertools.product((64, 128), (32, 64), (1, 2, 3)):
        if block_n <= max(64, N):
            yield FlashForward(block_n, block_m, num_warps=block_n // 16, num_stages=num_stages)


def tile_candidates() -> Iterator[Tile]:
    for block_n, block_m, num_stages in itertools.product((32, 64, 128), (32, 64, 128), (1, 2)):
        for num_warps in (4, 8):
            if block_n * block_m <= 128 * 64:
                yield Tile(block_n, block_m, num_warps, num_stages)


def general_candidates(default: GeneralBackward) -> Iterator[GeneralBackward]:
    """One kernel's tiles changed at a time: their times add up, so the best can be combined."""
    yield default
    for name, tile in itertools.product(("dq", "dk_dv", "dbias"), tile_candidates()):
        yield replace(default, **{name: tile})


@contextlib.contextmanager
def chunks_of(count: int) -> Iterator[None]:
    """The Hopper backward with so many chunks of images."""
    before = attention_backward_hopper.num_chunks
    attention_backward_hopper.num_chunks = lambda *_: count
    try:
        yield
    finally:
        attention_backward_hopper.num_chunks = before


def candidates_of(part: str, inputs: Inputs, N: int, K: int) -> dict[str, Callable[[], None]]:
    gpu = gpu_of(inputs.q)
    if part == "forward":
        default = forward_config(gpu, torch.bfloat16, N, N, K, False)
        configs = dict.fromkeys(forward_candidates(N, default))
        return {repr(config): lambda config=config: inputs.forward(config) for config in configs}
    tensors = (inputs.dout, inputs.q, inputs.k, inputs.v, inputs.out)
    runs = {choose_kernels(*tensors, 0.0): inputs.backward}
    if "hopper" in runs:
        for count in range(1, 13):

            def run(count=count) -> None:
                with chunks_of(count):
                    inputs.backward()

            runs[f"hopper, {count} chunks"] = run
    default = general_config(gpu, torch.bfloat16, N, N, K, False)
    for config in dict.fromkeys(general_candidates(default)):
        runs[repr(config)] = lambda config=config: inputs.backward(config)
    return runs


def works(run: Callable[[], None]) -> bool:
    """Whether a candidate compiles and fits: too much shared memory is no error worth a stop."""
    try:
        run()
    except Exception as error:
        print(f"  does not run: {type(error).__name__}: {str(error)[:80]!r}")
        return False
    return True


def record(path: Path, values: dict, result: dict) -> None:
    """Add what was found for a part and a shape to the file, in place of what it had for them."""
    named = ("part", "shape")
    results = [r for r in kept_results(path, values) if any(r[n] != result[n] for n in named)]
    content = {"conditions": values, "results": [*results, result]}
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1) + "\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("forward", "backward"))
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths N; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON; default results/tune-<gpu>.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU, and there is none: nothing was measured")
    device = torch.device("cuda")
    values = conditions(device, ["triton"], dtype="bfloat16", rounds=arguments.rounds)
    print(conditions_line(values))
    name = values["machine"].lower().replace(" ", "-")
    path = arguments.output or RESULTS / f"tune-{name}.json"
    parts = ("forward", "backward") if arguments.only is None else (arguments.only,)
    shapes = [s for s in SHAPES if arguments.tokens is None or s[2] in arguments.tokens]
    for (B, H, N, K), part in itertools.product(shapes, parts):
        inputs = Inputs(B, H, N, K)
        inputs.forward()  # the backward wants what it writes
        print(f"{part} B{B} H{H} N{N} K{K}")
        runs = candidates_of(part, inputs, N, K)
        runs = {name: run for name, run in runs.items() if works(run)}
        timings = time_interleaved(runs, device=device, rounds=arguments.rounds, calls=5)
        chosen = next(iter(runs))  # the first candidate is the table's
        for name, timing in sorted(timings.items(), key=lambda item: item[1].median_ms)[:8]:
            mark = "   <- the table's" if name == chosen else ""
            print(f"  {timing.median_ms:8.4f} ms  {name}{mark}")
        if timings[chosen].median_ms > min(t.median_ms for t in timings.values()):
            print(f"  {timings[chosen].median_ms:8.4f} ms  {chosen}   <- the table's")
        record(
            path,
            values,
            {
                "part": part,
                "shape": {"B": B, "H": H, "N": N, "K": K},
                "table": chosen,
                "ms": {name: timing.median_ms for name, timing in timings.items()},
            },
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
