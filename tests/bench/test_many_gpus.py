"""The computed tables of many GPUs: bytes as two ranks send them, times that add up."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from beit_fast.recipes import PRETRAIN

ROOT = Path(__file__).resolve().parents[2]
SENDERS = Path(__file__).with_name("two_senders.py")


@pytest.fixture
def many_gpus(bench):
    return bench("many_gpus")


@pytest.fixture(scope="module")
def sent():
    """Bytes that rank 0 of two wrote to the other over gloo, by case."""
    done = subprocess.run([sys.executable, str(SENDERS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def exchange_of(many_gpus, sent, kind, dtype="fp32", micro_batches=1):
    return many_gpus.Exchange(
        parallel=kind,
        num_parameters=sent["parameters"],
        block_parameters=sent["block parameters"],
        num_blocks=3,
        gradient_bytes=many_gpus.NUM_BYTES[dtype],
        micro_batches=micro_batches,
    )


@pytest.mark.parametrize("case", ["ddp fp32 1", "ddp fp32 3", "ddp bf16 1"])
def test_ddp_sends_the_bytes_that_are_counted(many_gpus, sent, case):
    kind, dtype, micro_batches = case.split()
    exchange = exchange_of(many_gpus, sent, kind, dtype, int(micro_batches))
    assert sent[case] == pytest.approx(exchange.bytes_sent(2), rel=0.01)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_fsdp_sends_the_bytes_that_are_counted(many_gpus, sent, micro_batches):
    """gloo has no reduce-scatter: what it does instead costs an all-reduce, once a step."""
    exchange = exchange_of(many_gpus, sent, "fsdp", micro_batches=micro_batches)
    more = (sent["reduce-scatter"] - many_gpus.share_sent(2)) * 4 * sent["parameters"]
    measured = sent[f"fsdp fp32 {micro_batches}"]
    assert measured == pytest.approx(exchange.bytes_sent(2) + more, rel=0.01)


def test_an_all_reduce_sends_twice_what_a_gather_does(many_gpus, sent):
    assert sent["gather"] == pytest.approx(many_gpus.share_sent(2), rel=0.01)
    assert sent["all-reduce"] == pytest.approx(2 * many_gpus.share_sent(2), rel=0.01)


def test_the_bytes_of_base_are_those_of_its_parameters(many_gpus):
    assert many_gpus.num_parameters("base") == 91_965_776
    r = many_gpus.row("base", 8)
    assert r["sent a GPU, MB"] == pytest.approx(2 * 7 / 8 * 4 * 91.965776)
    half = many_gpus.row("base", 8, gradients="bf16")
    assert half["sent a GPU, MB"] == pytest.approx(r["sent a GPU, MB"] / 2)


def test_what_hides_behind_computing_is_what_a_clock_would_say(many_gpus):
    """Pieces become ready one after the other, and the link takes one at a time."""

    def by_clock(computing, pieces, piece):
        link_free = 0.0
        for number in range(1, pieces + 1):
            link_free = max(link_free, number * computing / pieces) + piece
        return link_free - computing

    for computing, pieces, piece in ((1.0, 4, 0.1), (1.0, 4, 0.4), (0.3, 1, 0.2), (0.0, 5, 0.1)):
        shown = many_gpus.hidden_but(computing, pieces, piece)
        assert shown == pytest.approx(by_clock(computing, pieces, piece))


def test_an_exchange_is_as_long_as_its_links_say(many_gpus, monkeypatch):
    monkeypatch.setattr(many_gpus, "HOP", 0.0)
    monkeypatch.setattr(many_gpus, "LINK_REACHES", 1.0)
    node = many_gpus.Cluster(gpus=8, nvlink=400e9)
    assert node.gather_seconds(400e9) == pytest.approx(7 / 8)
    two = many_gpus.Cluster(gpus=16, nvlink=400e9, links=4)
    assert two.gather_seconds(400e9) == pytest.approx(7 / 8 + 1 / 2 * 100 / 50)


def test_efficiency_is_of_one_gpu_and_losses_have_a_name(many_gpus):
    one = many_gpus.row("base", 1)
    assert one["efficiency"] == pytest.approx(1)
    assert one["of it shown, ms"] == 0
    few = many_gpus.row("base", 64, links=1)
    assert few["lost to"] == "exchange"
    assert few["efficiency"] == pytest.approx(few["images/s"] / 64 / one["images/s"])
    assert few["step, ms"] == pytest.approx(few["computing, ms"] + few["of it shown, ms"])
    assert many_gpus.row("base", 64)["lost to"] == "small batches"
    assert many_gpus.row("base", 8)["lost to"] == "computing"


def test_images_that_come_too_late_hold_the_step_down(many_gpus, monkeypatch):
    monkeypatch.setattr(many_gpus, "CORES", 2)
    held = many_gpus.row("base", 8)
    assert held["lost to"] == "images"
    assert held["images/s"] == pytest.approx(8 * 2 * many_gpus.IMAGES_PER_CORE)
    monkeypatch.setattr(many_gpus, "CORES", 64)
    assert many_gpus.row("base", 8)["lost to"] == "computing"
    monkeypatch.setattr(many_gpus, "IMAGES_PER_PROCESS", 1500)  # cores do not help
    held = many_gpus.row("base", 8)
    assert held["lost to"] == "images"
    assert held["images/s"] == pytest.approx(8 * 1500)


def test_hours_are_images_by_their_rate(many_gpus):
    r = many_gpus.row("large", 8)
    assert r["300 epochs 1K, h"] == pytest.approx(300 * 1_281_167 / r["images/s"] / 3600)
    assert r["150 epochs 22K, h"] == pytest.approx(150 * 14_197_122 / r["images/s"] / 3600)
    assert r["JPEG, MB/s a node"] == pytest.approx(r["images/s"] * 0.110)
    # Steps an epoch in the authors' logs (spec 6).
    assert (many_gpus.IMAGENET_1K // 2048, many_gpus.IMAGENET_22K // 2048) == (625, 6932)


def test_a_step_is_split_as_the_recipes_split_it(many_gpus):
    assert many_gpus.split(8, 2048) == (256, 1)
    assert many_gpus.split(4, 2048) == (256, 2)
    with pytest.raises(ValueError, match="numbers of GPUs that divide it"):
        many_gpus.split(24, 2048)
    with pytest.raises(ValueError, match="give a multiple"):
        many_gpus.split(9, 9 * 256)


def test_what_is_assumed_is_what_was_measured_or_planned(many_gpus):
    with (ROOT / "bench" / "results" / "data.csv").open(newline="") as file:
        (measured,) = [
            float(row["value"])
            for row in csv.DictReader(file)
            if row["bench"].startswith("images to two views")
            and (row["case"], row["figure"]) == ("fast", "median")
        ]
    assert round(measured) == many_gpus.IMAGES_PER_CORE
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (us,) = re.findall(r"\*\*(\d+) us\*\* of each image", text)
    assert round(1e6 / int(us), -1) == many_gpus.IMAGES_PER_PROCESS
    figures = json.loads((ROOT / "bench" / "predictions.json").read_text())["figures"]
    (of_floor,) = [f["of_floor"] for f in figures if f["match"] == "steps-tokenizer/*/ours"]
    assert of_floor[0] <= many_gpus.REACHES <= of_floor[1]
    for name in ("beit_plus_base_in1k", "beit_plus_large_in22k"):
        config = PRETRAIN[name]()
        assert 16 * config.data.batch_size * config.run.accumulate == many_gpus.STEP_IMAGES


def test_fsdp_keeps_a_part_and_whole_gradients_between_micro_batches(many_gpus):
    whole = many_gpus.memory("large", 8, "ddp")
    assert whole["moments"] == 8 * many_gpus.num_parameters("large")
    part = many_gpus.memory("large", 8, "fsdp")
    assert sum(part.values()) == pytest.approx(sum(whole.values()) / 8)
    assert many_gpus.memory("large", 8, "fsdp", 2)["gradients"] == whole["gradients"]


def test_the_command_prints_a_table_and_says_that_it_is_computed(bench, monkeypatch, capsys):
    roofline = bench("roofline")
    monkeypatch.setattr(
        "sys.argv",
        [
            "roofline.py",
            "--size",
            "large",
            "--gpus",
            "8",
            "64",
            "--links",
            "1",
            "--machines",
            "H100",
            "A100",
        ],
    )
    roofline.main()
    text = capsys.readouterr().out
    assert text.count("computed, not measured") == 2
    assert text.count("large") == 4
    for wrong, said in (("--gpus 24", "divide it"), ("--gpus 8 --machines here", "A100, H100")):
        monkeypatch.setattr("sys.argv", f"roofline.py {wrong}".split())
        with pytest.raises(SystemExit):
            roofline.main()
        assert said in capsys.readouterr().err


def test_the_pages_say_what_the_tables_say(many_gpus):
    pages = {
        name: " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split())
        for name in ("distributed", "new-machine")
    }
    eight = {size: many_gpus.row(size, 8) for size in ("base", "large")}
    assert all(r["efficiency"] == pytest.approx(0.98, abs=0.005) for r in eight.values())
    assert "The missing 2 % is the optimiser" in pages["distributed"]
    fsdp = many_gpus.row("base", 8, parallel="fsdp")["efficiency"]
    assert fsdp == pytest.approx(1, abs=0.005)
    gain = [
        many_gpus.row(size, 64, links=1, gradients="bf16")["efficiency"]
        / many_gpus.row(size, 64, links=1)["efficiency"]
        for size in ("base", "large")
    ]
    assert all(1.45 < ratio < 1.65 for ratio in gain)
    assert "bf16 gradients are worth half as much again" in pages["distributed"]
    assert f"{many_gpus.REACHES:g}, which is assumed" in pages["distributed"]
    assert f"A core gives {many_gpus.IMAGES_PER_CORE} a second" in pages["distributed"]
    gigabytes = eight["base"]["JPEG, MB/s a node"] / 1e3
    assert f"read {gigabytes:.1f} GB a second for B" in pages["new-machine"]
    cores = eight["base"]["cores a GPU"]
    assert f"B on H100 wants {cores:.1f} cores" in pages["new-machine"]
    rate = round(eight["base"]["images/s"], -3)
    assert f"For B on H100 {rate:,.0f} are computed" in pages["new-machine"]
