"""Budgets of the machine code, for GPUs that are not here: a regression of the compiler's shows.

Everything in `bench/launches.py` is compiled for sm_80, sm_90 and sm_100, in a process without the
interpreter, and for sm_120 what multiplies: there alone its shared memory and its instructions ask
for code of their own, and compiling is what takes the time of these tests. On sm_86 and sm_89 run
the tiles of sm_80 or of sm_120, as a test checks that holds them to their memory: of theirs a share
is compiled.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from beit_fast.kernels._triton import (
    A100,
    B200,
    H100,
    RTX3090,
    RTX4090,
    RTX5090,
    pretend,
    record,
)
from beit_fast.kernels.attention.configs import Tile, dbias_ctas

pytest.importorskip("triton", reason="machine code needs Triton")

BENCH = Path(__file__).resolve().parents[2] / "bench"
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
ARCHES = (80, 90, 100, 120)
MULTIPLYING = ("attention", "argmax", "conv")
# Most shared memory of a CTA, in bytes: what the CUDA programming guide lists.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# What may spill, loads and stores, by kernel and architecture: values that a loop does not change,
# and eight that it does in the kernel that holds a tile of dbias (64 x 208 fp32) in registers
# beside its scores; and, by case, widths that no model here has.
SPILLS = {
    ("dq_dbias", 90): (34, 36),
    ("dk_dv", 80): (2, 2),
    ("window_backward", 80): (8, 8),
    ("window_backward", 90): (20, 20),
    ("window_backward", 100): (4, 4),
    ("dk_dv", 120): (2, 2),
    ("window_backward", 120): (16, 16),
    ("conv", 120): (0, 9),  # written and never read
}
SPILLS_OF_CASES = {"residual-D8192-bf16": (32, 32), "residual-D384-bf16": (2, 2)}

# Kernels that move what is large, and those of them that write little.
STREAMING = {
    *("attention_whole", "attention_flash", "dq_dbias", "dq", "dk_dv", "dbias", "window_backward"),
    *("scale_residual_forward", "scale_residual_backward"),
    *("patches", "mask_embed_forward", "mask_embed_backward"),
    *("gather_norm", "cross_entropy_gradient", "scatter_norm_backward"),
    *("conv_addressed", "conv_pixels"),
}
READING = {"cross_entropy", "linear_argmax"}

# sm_90: most registers, most KiB, fewest CTAs on a multiprocessor, matrix instructions.
BUDGETS = {
    ("attention-N197", "attention_whole"): (168, 74, 3, 25),
    ("attention-N197", "dq_dbias"): (255, 100, 2, 45),
    ("attention-N197", "dk_dv"): (168, 74, 3, 58),
    ("attention-N197-frozen", "dq"): (168, 76, 2, 45),
    ("attention-N144", "attention_whole"): (168, 74, 3, 17),
    ("attention-N256", "attention_whole"): (207, 80, 2, 24),
    ("attention-N64", "attention_whole"): (96, 32, 5, 8),
    ("attention-N64", "window_backward"): (255, 40, 2, 20),
    ("attention-N49-K32", "attention_whole"): (96, 32, 5, 6),
    ("attention-N49-K32", "window_backward"): (168, 40, 3, 16),
    ("conv-C256-D64-k3-relu_input", "conv"): (108, 81, 2, 8),
    ("conv-C64-D64-k3", "conv"): (124, 81, 2, 8),
    ("conv-C64-D256-k1-residual-pool", "conv"): (128, 113, 2, 4),
    ("conv-C128-D128-k3", "conv"): (192, 113, 2, 8),
    ("conv-C512-D512-k3", "conv"): (176, 177, 1, 4),
    ("attention-N577", "attention_flash"): (128, 64, 2, 13),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    codes = []
    for share in (("--arch", "80", "90", "100"), ("--arch", "120", "--only", *MULTIPLYING)):
        path = tmp_path_factory.mktemp("machine_code") / "codes.json"
        run(str(BENCH / "machine_code.py"), *share, "--json", str(path))
        codes += json.loads(path.read_text())
    return codes


@pytest.fixture(scope="module")
def compiled_for_ada(tmp_path_factory):
    path = tmp_path_factory.mktemp("machine_code") / "ada.json"
    share = ("--only", "K128", "--arch", "86", "89")
    run(str(BENCH / "machine_code.py"), *share, "--json", str(path))
    return json.loads(path.read_text())


def run(*arguments):
    """What python prints with these arguments, without the interpreter of kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def name_of(code):
    return code["kernel"].strip("_").removesuffix("_kernel")


def complaints(compiled, is_wrong):
    return [
        f"{code['case']}, {name_of(code)}, sm_{code['arch']}" for code in compiled if is_wrong(code)
    ]


def test_all_architectures_are_compiled(compiled):
    assert {code["arch"] for code in compiled} == set(ARCHES)
    cases = {arch: {c["case"] for c in compiled if c["arch"] == arch} for arch in ARCHES}
    assert cases[80] == cases[90] == cases[100]
    assert cases[120] == {case for case in cases[80] if case.startswith(MULTIPLYING)}


def test_every_kernel_fits_the_shared_memory_of_its_gpu(compiled, compiled_for_ada):
    assert {code["arch"] for code in compiled_for_ada} == {86, 89}
    codes = compiled + compiled_for_ada
    assert not complaints(codes, lambda code: code["shared_bytes"] > SHARED[code["arch"]])
    assert not complaints(codes, lambda code: code["ctas_per_sm"] < 1)


def test_ada_and_consumer_ampere_run_tiles_of_sm_80_or_120_within_their_memory(compiled, bench):
    cases = bench("launches").CASES
    gpus, tiles = (A100, RTX3090, RTX4090, RTX5090), {}
    for case, gpu in itertools.product(cases, gpus):
        with pretend(gpu), record() as launches:
            cases[case]()
        tiles[case, gpu] = tiles_of(launches)
    of_80 = [case for case in cases if tiles[case, RTX3090] == tiles[case, A100]]
    others = set(cases) - set(of_80)
    assert "attention-N197-K128" in others  # its dbias takes 112 KiB on sm_80
    assert all(tiles[case, RTX3090] == tiles[case, RTX5090] for case in others)
    assert all(tiles[case, RTX3090] == tiles[case, RTX4090] for case in cases)
    run_there = [code for code in compiled if code["arch"] == 80 and code["case"] in of_80]
    assert not complaints(run_there, lambda code: code["shared_bytes"] > SHARED[86])


def test_dbias_is_chunked_for_the_ctas_that_its_machine_code_allows(compiled, bench):
    gpus = {80: A100, 90: H100, 100: B200, 120: RTX5090}
    cases = bench("launches").CASES
    codes = [code for code in compiled if name_of(code) == "dbias"]
    assert {code["arch"] for code in codes} == set(ARCHES)
    counted = []
    for code in codes:
        with pretend(gpus[code["arch"]]), record() as launches:
            cases[code["case"]]()
        (launch,) = (one for one in launches if one.kernel.fn.__name__ == code["kernel"])
        tile = Tile(
            *(launch.arguments[name] for name in ("BLOCK_N", "BLOCK_M")),
            *(launch.options[name] for name in ("num_warps", "num_stages")),
        )
        q, K, rng = (launch.arguments[name] for name in ("q_ptr", "K", "rng_ptr"))
        counted.append(dbias_ctas(gpus[code["arch"]], q.dtype, K, tile, rng is not None))
    wrong = [
        f"{code['case']}, sm_{code['arch']}: {code['ctas_per_sm']}, chunked for {ctas}"
        for code, ctas in zip(codes, counted, strict=True)
        if ctas != code["ctas_per_sm"]
    ]
    assert not wrong


def tiles_of(launches):
    """Each kernel with its compile-time arguments and options: what sizes its tiles and stages."""
    return {
        (
            launch.kernel.fn.__name__,
            *(str(launch.arguments.get(p)) for p in launch.kernel.fn.__annotations__),
            *launch.options.items(),
        )
        for launch in launches
    }


def test_no_kernel_adds_atomically(compiled):
    assert not complaints(compiled, lambda code: code["atomics"] > 0)


def test_every_kernel_is_code_and_not_a_trap(compiled):
    # Too many live accumulators compile to a trap on sm_100, without an error.
    assert not complaints(compiled, lambda code: code["instructions"] < 150)


def test_nothing_spills_but_what_is_known(compiled):
    def spills(code):
        known = SPILLS_OF_CASES.get(code["case"], (0, 0))
        loads, stores = SPILLS.get((name_of(code), code["arch"]), known)
        return code["spill_loads"] > loads or code["spill_stores"] > stores

    assert not complaints(compiled, spills)


def test_products_run_on_the_tensor_cores_of_their_architecture(compiled):
    def is_wrong(code):
        if not multiplies(code) or code["case"].endswith("fp32"):
            return False
        return TENSOR_CORE[code["arch"]] not in code["tensor_core"]

    assert not complaints(compiled, is_wrong)


def test_fp32_products_are_exact(compiled):
    # Triton 3.6 takes TF32 for some "ieee" products of 64 rows and more on sm_100.
    exact = [c for c in compiled if multiplies(c) and c["case"].endswith("fp32")]
    assert len({code["case"] for code in exact}) >= 2
    assert not complaints(exact, lambda code: bool(code["tensor_core"]))


def test_the_main_kernels_read_and_write_sixteen_bytes_at_a_time(compiled):
    assert {name_of(code) for code in compiled} >= STREAMING | READING

    def is_wrong(code):
        reads = {"128", "tma"} & set(code["loads"])
        writes = "128" in code["stores"]
        return not reads if name_of(code) in READING else not (reads and writes)

    main = [code for code in compiled if name_of(code) in STREAMING | READING]
    assert not complaints(main, is_wrong)


@pytest.mark.parametrize(("case", "kernel"), BUDGETS, ids=lambda value: value.replace(" ", "-"))
def test_a_kernel_keeps_its_budget_on_hopper(compiled, case, kernel):
    registers, kib, ctas, products = BUDGETS[case, kernel]
    (code,) = [c for c in compiled if (c["case"], name_of(c), c["arch"]) == (case, kernel, 90)]
    assert code["registers"] <= registers
    assert code["shared_bytes"] <= kib * 1024
    assert code["ctas_per_sm"] >= ctas
    assert code["tensor_core"] == {"HGMMA": products}


def test_the_hopper_backward_reads_through_the_copy_engine(compiled):
    (code,) = [c for c in compiled if (c["case"], name_of(c)) == ("attention-N197", "dq_dbias")]
    assert code["loads"]["tma"] >= 20


def test_convolutions_move_their_tiles_by_the_copy_engine_where_there_is_one(compiled):
    convs = [code for code in compiled if name_of(code) == "conv"]
    assert {code["arch"] for code in convs} == {90, 100, 120}

    def is_wrong(code):
        return code["loads"].get("tma", 0) < 6 or set(code["stores"]) != {"tma"}

    assert not complaints(convs, is_wrong)


def test_lanes_of_the_resize_read_one_row(compiled):
    # Triton's choice where nothing is known to be dense. Else a load would be of 32 rows.
    passes = [code for code in compiled if name_of(code) == "resize_pass"]
    assert {code["arch"] for code in passes} == {80, 90, 100}
    assert not complaints(passes, lambda code: code["lanes"] != ["32x1"])
    assert not complaints(passes, lambda code: code["registers"] > 72)


def test_jitter_rounds_products_as_pillow_does(compiled):
    jitter = [code for code in compiled if name_of(code) in ("grey_sums", "jittered_crop")]
    assert len(jitter) == 6
    assert not complaints(jitter, lambda code: code["fused"] > 0)


def multiplies(code) -> bool:
    return code["case"].startswith(("attention-N", "conv-")) or name_of(code) == "linear_argmax"
