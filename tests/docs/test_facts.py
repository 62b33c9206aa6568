"""Numbers and names on the pages are those of the code, and of what was measured."""

import csv
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from beit_fast import PUBLISHED
from beit_fast.cli import VERBS
from beit_fast.data import device_decode, device_views, finishing
from beit_fast.data.masking import MaskingConfig
from beit_fast.data.sources import decode, reading
from beit_fast.data.sources.limits import READS
from beit_fast.data.token_cache import record_dtype
from beit_fast.data.views.config import ViewConfig
from pages import ROOT, commands_of, name_of, pages, text_of

RESULTS = ROOT / "bench" / "results"
RECIPES = {
    verb: {name: make() for name, make in known.items()} for verb, (known, _) in VERBS.items()
}


def page(name: str) -> str:
    """The words of a page of docs/, on one line."""
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


def rows_of(name: str) -> list[list[str]]:
    """Cells of all rows of all tables of a page, that begin with a name in backticks."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_the_table_of_recipes_is_that_of_the_recipes(verb):
    """Length, images a step and rate. Of torchrun's ranks the docstring has the number."""
    rows = {row[0].strip("`"): row[1:] for row in rows_of(f"{verb}.md")}
    for recipe, config in RECIPES[verb].items():
        assert recipe in rows
        cells = rows[recipe]
        run = config.run
        length = f"{run.steps} steps" if run.steps else f"{run.epochs:g} epochs"
        assert length.removesuffix("" if verb == "pretrain" else " epochs") in cells
        ranks = re.search(r"^ *(\d+) ranks x", VERBS[verb][0][recipe].__doc__, re.MULTILINE)
        step = config.data.batch_size * run.accumulate * (int(ranks[1]) if ranks else 1)
        assert str(step) == cells[-2], recipe
        assert float(cells[-1]) == config.optim.lr, recipe


def test_the_table_of_ade20k_is_that_of_the_recipes():
    """Crop, rate and decay; what is expected stands in the first line of a recipe's help."""
    rows = {row[0].strip("`"): row[1:] for row in rows_of("segment.md")}
    for recipe, config in RECIPES["segment"].items():
        if "ade20k" not in recipe:
            continue
        _, crop, rate, decay, expected = rows.pop(recipe)
        assert (int(crop),) * 2 == config.model.image_pixels
        assert (float(rate), float(decay)) == (config.optim.lr, config.layer_decay)
        first = VERBS["segment"][0][recipe].__doc__.splitlines()[0]
        assert re.findall(r": ([\d.]+) mIoU", first) == ([] if "not" in expected else [expected])
    assert not [name for name in rows if "ade20k" in name]


def test_the_kinds_of_views_are_those_there_are():
    kinds = get_args(get_type_hints(ViewConfig)["kind"])
    told = [row[0].strip("`") for row in rows_of("data.md")]
    assert [name for name in told if name in kinds] == ["fast", "reference", "gpu"]
    assert set(kinds) == {"fast", "reference", "gpu"}


def test_what_kind_gpu_leaves_to_the_loader_and_takes_is_as_measured_and_set():
    with (RESULTS / "data-device-cpu.csv").open(newline="") as file:
        rate = {row["case"]: float(row["value"]) for row in csv.DictReader(file)}
    text = page("data.md")
    assert f"reads and draws for {round(rate['gpu'], -2):,.0f} images a second" in text
    assert f"of kind `fast` it makes {round(rate['fast'], -2):.0f} pairs" in text
    pixels = device_views.PIXELS_AT_ONCE
    assert f"up to {pixels / 1e6:.0f} million pixels at a time, {10 * pixels / 1e9:.1f} GB" in text
    assert finishing.AHEAD == 2
    assert "two batches of views ahead" in text
    counts = device_decode.DecodeCounts()
    counts.add(["progressive"] * 11 + ["CMYK"] + [""] * 51188)
    assert str(counts) in text


def test_the_rates_of_the_transforms_are_the_measured_ones():
    with (RESULTS / "data.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(r["bench"].split(",")[0], r["case"], r["figure"]): r for r in rows}
    value = {key: float(row["value"]) for key, row in found.items()}
    views, distance = "images to two views", "fast against reference"
    rate = {kind: f"{value[views, kind, 'median']:.0f}" for kind in ("fast", "reference")}
    text = page("data.md")
    assert f"pairs of views a second and core | {rate['fast']} | {rate['reference']} |" in text
    for side in ("224", "112"):
        mean, decibel = value[distance, side, "mean"], value[distance, side, "PSNR median"]
        assert re.search(
            rf"difference of the {side} px view.*? \| {mean:.1f} \| 0 \| "
            rf"\| the same as PSNR \| {decibel:.0f} dB \|",
            text,
        )
    jitter = sum(
        value["jitter of fast on the device", side, "ms per image"] for side in ("224", "112")
    )
    assert f"costs {jitter:.1f} ms an image" in text
    masks = value["masks of 14x14", "block", "median"]
    assert f"draws {round(masks, -3):,.0f} masks of `block`" in text


def test_the_words_of_masks_and_cache_are_those_of_the_code():
    text = page("data.md")
    assert f"takes {record_dtype(14 * 14).itemsize} bytes" in text
    demo, digits = (RECIPES["pretrain"][name] for name in ("demo", "digits"))
    for config in (demo, digits):
        height, width = config.model.grid
        assert f"{config.masking.num_masked} of {height * width}" in text
    strategies = get_args(get_type_hints(MaskingConfig)["strategy"])
    assert {f"`{name}`" for name in strategies} <= set(text.split())
    assert MaskingConfig().num_masked == 75


def test_the_settings_of_reads_have_the_defaults_and_pauses_of_the_code():
    text = page("data.md")
    assert f"| `--data.read_timeout` | {READS.read_timeout:g} |" in text
    assert f"| `--data.read_retries` | {READS.read_retries} |" in text
    pauses = [reading._PAUSE]
    for _ in range(3):
        pauses.append(min(10 * pauses[-1], reading._LONGEST_PAUSE))
    assert f"after {', '.join(f'{pause:g}' for pause in pauses)} ... seconds" in text
    assert f"More than {reading._MAX_HANGING} of them at once" in text
    assert f"more than {decode._MAX_SCANS} scans" in text


def test_the_table_of_augmentation_has_the_defaults():
    augment = RECIPES["finetune"]["small_data"].augment
    rows = {row[0].strip("`").removeprefix("--augment."): row[1] for row in rows_of("finetune.md")}
    for name in ("hflip", "rand_augment", "erase", "mixup", "cutmix", "label_smoothing"):
        assert float(rows[name].split(",")[0]) == getattr(augment, name), name
    assert rows["scale"].startswith("`[{:g},{:g}]`".format(*augment.scale))


def test_commands_of_several_ranks_keep_the_images_of_the_recipes_step():
    """2048, however many nodes, ranks and micro-batches they have."""
    header = (ROOT / "docs" / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    slurm = dict(re.findall(r"^#SBATCH --(nodes|gpus-per-node)=(\d+)$", header, re.MULTILINE))
    seen = 0
    for command in (c.text for name in pages() for c in commands_of(text_of(name))):
        found = re.search(r" pretrain (beit_\w+_in(?:1|22)k) ", command)
        if found is None or not command.startswith(("torchrun", "sbatch")):
            continue
        config = RECIPES["pretrain"][found[1]]

        def given(flag, default, command=command):
            value = re.search(rf"--{re.escape(flag)}[= ](\d+)", command)
            return int(value[1] if value else default)

        nodes = given("nnodes", slurm["nodes"] if "sbatch" in command else 1)
        ranks = nodes * given("nproc_per_node", slurm["gpus-per-node"])
        batch = given("data.batch_size", config.data.batch_size)
        assert ranks * batch * given("run.accumulate", config.run.accumulate) == 2048, command
        seen += 1
    assert seen >= 6


@pytest.mark.parametrize("path", ["Dockerfile", "docs/new-machine.md"])
def test_eight_ranks_in_a_container_keep_the_images_of_a_recipe_for_one(path):
    text = text_of(ROOT / path).replace("\\\n#", " ")
    (command,) = re.findall(r"torchrun --nproc_per_node=8 .* pretrain small .*", text)
    given = dict(re.findall(r"--(\S+)[ =](\d+)", command))
    small = RECIPES["pretrain"]["small"]
    images = int(given["data.batch_size"]) * int(given["run.accumulate"])
    assert 8 * images == small.data.batch_size * small.run.accumulate == 1024
    first = small.tokenizer_training
    assert first.run.accumulate == 1
    assert 8 * int(given["tokenizer_training.data.batch_size"]) == first.data.batch_size == 64


def test_the_page_of_a_new_machine_has_the_lengths_and_versions_of_the_code():
    text = page("new-machine.md")
    config = RECIPES["pretrain"]["beit_plus_base_in1k"]
    steps = 1_281_167 // 2048
    assert f"`pretrain 50/{config.run.num_steps(steps)}`" in text
    assert f"every {config.run.log_every} steps" in text
    assert f"for ten epochs, {config.optim.warmup_epochs * steps:.0f} steps" in text
    assert f"after {config.run.save_every} steps |" in text
    pinned = re.search(r"^torch==(\S+)$", text_of(ROOT / "constraints.txt"), re.MULTILINE)[1]
    cuda = re.search(r"^FROM nvidia/cuda:(\d+\.\d+)", text_of(ROOT / "Dockerfile"), re.MULTILINE)[1]
    assert f"the tested torch {pinned} brings CUDA {cuda}" in text


def test_the_ratios_of_acceleration_are_the_measured_ones():
    with (RESULTS / "accelerate-base-cpu.csv").open(newline="") as file:
        measured = {(r["pass"], r["model"]): float(r["ratio"]) for r in csv.DictReader(file)}
    text = page("accelerate.md") + page("performance.md")
    for (kind, model), ratio in measured.items():
        assert f"{ratio:.2f}" in text or model.startswith("accelerated"), (kind, model)


def test_the_published_checkpoints_are_counted():
    text = page("models-and-checkpoints.md")
    assert re.search(rf"\b{len(PUBLISHED)} (?:of them|published)", text)


def test_the_tables_are_those_of_the_results():
    command = [sys.executable, str(ROOT / "bench" / "report.py"), "--pages", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", pages(), ids=name_of)
def test_no_placeholder_is_left(path):
    assert not re.findall(r"\b[A-Z]+_(?:OUTPUT|NEWEST|NUMBERS|TABLE|MINUTES)\b|@@", text_of(path))
