"""What the compiler makes of every kernel, for GPUs that need not be there.

    python bench/machine_code.py [--only NAME ...] [--arch 80 90 100 120] [--json FILE]

Each case of `launches.py` is run with tensors without memory on a pretended GPU; what it would
have launched is compiled to machine code and counted: registers, spilled values, shared memory,
how many CTAs fit a multiprocessor, tensor-core instructions, widths of memory accesses, atomics.
Needs Triton and no GPU.
"""

import argparse
import collections
import concurrent.futures
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from launches import CASES
from timing import format_table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from beit_fast.kernels._triton import (
    A100,
    B200,
    H100,
    RTX3090,
    RTX4090,
    RTX5090,
    Launch,
    pretend,
    record,
)

ARCHES = (80, 90, 100, 120)  # on 86 and 89 run tiles of 80 or 120
GPUS = {80: A100, 86: RTX3090, 89: RTX4090, 90: H100, 100: B200, 120: RTX5090}
# Of a multiprocessor: most threads and CTAs. Its registers are 65536 everywhere, its shared memory
# is 1 KiB more than a CTA can have.
LIMITS = {80: (2048, 32), 86: (1536, 16), 89: (1536, 24), 90: (2048, 32), 100: (2048, 32),
          120: (1536, 24)}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_LANES = re.compile(r"threadsPerWarp = \[(\d+), (\d+)\]")
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "DMMA", "IMMA", "QGMMA")


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel. Instruction counts are static: a loop's body counts once."""

    case: str
    kernel: str
    arch: int
    num_warps: int
    registers: int  # of a thread
    spill_loads: int
    spill_stores: int
    shared_bytes: int
    ctas_per_sm: int
    instructions: int
    tensor_core: dict[str, int]  # HMMA, HGMMA ...: how many
    exp2: int
    fused: int  # products and sums of fp32 in one rounding
    lanes: list[str]  # how the threads of a warp lie in tiles of two axes: "32x1"
    loads: dict[str, int]  # from global memory, by width in bits; "tma": tensor descriptors
    stores: dict[str, int]
    atomics: int


def launches_of(case: str, arch: int) -> list[Launch]:
    """Distinct launches of a case on an architecture, in order."""
    with pretend(GPUS[arch]), record() as launches:
        CASES[case]()
    distinct: dict[str, Launch] = {}
    for launch in launches:
        source, options = _source(launch, arch)
        distinct.setdefault(f"{source.hash()} {sorted(options.items())}", launch)
    return list(distinct.values())


def compile_launch(case: str, launch: Launch, arch: int) -> MachineCode:
    """Compile as Triton's launcher would for these arguments, and count."""
    source, options = _source(launch, arch)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("cuobjdump", "-sass", file.name)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    names = [
        match.group(1) for match in re.finditer(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.+?);", sass, re.M)
    ]
    # "@P0 LDG.E.128 R4, ..." -> "LDG.E.128"
    names = [re.sub(r"^@!?U?P\w+\s+", "", name).split()[0] for name in names]
    stems = collections.Counter(name.split(".")[0] for name in names)
    threads = 32 * launch.options["num_warps"]
    shared_bytes = compiled.metadata.shared
    return MachineCode(
        case=case,
        kernel=launch.kernel.fn.__name__,
        arch=arch,
        num_warps=launch.options["num_warps"],
        registers=registers,
        spill_loads=stems["LDL"],
        spill_stores=stems["STL"],
        shared_bytes=shared_bytes,
        ctas_per_sm=_ctas_per_sm(arch, registers, threads, shared_bytes),
        instructions=len(names) - stems["NOP"],
        tensor_core={stem: stems[stem] for stem in TENSOR_CORE if stems[stem]},
        exp2=sum(name.startswith("MUFU.EX2") for name in names),
        fused=stems["FFMA"] + stems["FFMA2"],
        lanes=sorted({f"{a}x{b}" for a, b in _LANES.findall(compiled.asm["ttgir"])}),
        loads=_widths(names, ("LDG", "LDGSTS"), tma="UTMALDG"),
        stores=_widths(names, ("STG",), tma="UTMASTG"),
        atomics=sum(stems[stem] for stem in ("RED", "ATOM", "ATOMG", "REDG")),
    )


def compile_cases(
    cases: list[str], arches: list[int], workers: int = 2
) -> tuple[list[MachineCode], list[str]]:
    """Every launch of the cases on every architecture, and what failed to compile, if anything."""
    jobs = [(case, launch, arch) for arch in arches for case in cases
            for launch in launches_of(case, arch)]  # fmt: skip
    results, failures = [], []
    # Triton compiles outside the interpreter lock for the larger part: ptxas and LLVM.
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(compile_launch, *job) for job in jobs]
        for (case, launch, arch), future in zip(jobs, futures, strict=True):
            try:
                results.append(future.result())
            except Exception as error:
                name = launch.kernel.fn.__name__
                failures.append(f"{case}, {name}, sm_{arch}: {type(error).__name__}: {error}")
    return results, failures


def _source(launch: Launch, arch: int) -> tuple[ASTSource, dict]:
    """The specialisation that Triton 3.6 would compile: the launcher's own functions decide it."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.options)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, options
    )
    return ASTSource(kernel, signature, constexprs, attributes), options.__dict__


def _ctas_per_sm(arch: int, registers: int, threads: int, shared_bytes: int) -> int:
    most_threads, most_ctas = LIMITS[arch]
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    by_shared = (GPUS[arch].shared_bytes + 1024) // (shared_bytes + 1024)  # each reserves 1 KiB
    return min(by_registers, by_shared, most_threads // threads, most_ctas)


def _widths(names: list[str], stems: tuple[str, ...], tma: str) -> dict[str, int]:
    counts: collections.Counter = collections.Counter()
    for name in names:
        stem, *modifiers = name.split(".")
        if stem in stems:
            bits = {"U8": "8", "S8": "8", "U16": "16", "S16": "16", "64": "64", "128": "128"}
            counts[next((bits[m] for m in modifiers if m in bits), "32")] += 1
        elif stem == tma:
            counts["tma"] += 1
    return dict(sorted(counts.items()))


def _run(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _row(code: MachineCode) -> dict:
    def counts(values: dict[str, int]) -> str:
        return " ".join(f"{name}:{count}" for name, count in values.items()) or "-"

    return {
        "case": code.case,
        "kernel": code.kernel.strip("_").removesuffix("_kernel"),
        "sm": code.arch,
        "warps": code.num_warps,
        "regs": code.registers,
        "spills": f"{code.spill_loads}/{code.spill_stores}",
        "KiB": round(code.shared_bytes / 1024, 1),
        "CTAs": code.ctas_per_sm,
        "instr": code.instructions,
        "tensor": counts(code.tensor_core),
        "ex2": code.exp2,
        "loads": counts(code.loads),
        "stores": counts(code.stores),
        "atomics": code.atomics,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHES, choices=list(GPUS))
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--workers", type=int, default=2, help="compilations at a time")
    arguments = parser.parse_args()
    cases = [case for case in CASES if any(part in case for part in arguments.only)]
    if not cases:
        parser.error(f"no case contains one of {arguments.only}; there are: {', '.join(CASES)}")
    results, failures = compile_cases(cases, arguments.arch, arguments.workers)
    if results:
        print(f"triton {triton.__version__}; spills are loads/stores, loads and stores bits:count")
        print(format_table([_row(code) for code in results]))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(code) for code in results], indent=1) + "\n")
    if failures:
        raise SystemExit("\n".join(["failed to compile:", *failures]))


if __name__ == "__main__":
    main()
