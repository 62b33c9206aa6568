"""Counts against what torch counts, and against the figures that were published."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.model.config import BeitConfig, beit_config
from beit_fast.model.heads import BeitForMaskedImageModeling
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Encoder

SMALL = BeitConfig(img_size=64, embed_dim=64, depth=3, num_heads=2, mlp_ratio=3.0, vocab_size=96)
BASE = beit_config("beit_base_patch16_224_8k_vocab")
LARGE = beit_config("beit_large_patch16_224_8k_vocab")


@pytest.fixture
def roofline(bench):
    return bench("roofline")


def test_model_flops_are_those_that_torch_counts(roofline, bench):
    B, num_masked = 2, 5
    model = bench("peers_pretrain").OfficialForMaskedImageModeling(SMALL)  # products of torch alone
    images = torch.randn(B, 3, 64, 64)
    mask = torch.zeros(B, SMALL.num_patches, dtype=torch.bool)
    mask[:, :num_masked] = True
    counter = FlopCounterMode(display=False)
    with counter:
        model(images, mask, None, torch.zeros(B, SMALL.num_patches, dtype=torch.long)).backward()
    counted = roofline.model_flops_per_image(SMALL, num_masked)
    assert counter.get_total_flops() == B * counted


def test_tokenizer_flops_are_those_that_torch_counts(roofline):
    dvae = DvaeConfig(vocab_size=64, encoder_width=16, blocks_per_group=3)
    counter = FlopCounterMode(display=False)
    with counter:
        Encoder(dvae)(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == roofline.tokenizer_flops_per_image(dvae, SMALL)


def test_savings_count_what_is_left_to_do(roofline):
    num_masked, dvae = 6, DvaeConfig(vocab_size=64, encoder_width=16)
    saved = roofline.tokenizer_flops_per_image(dvae, SMALL, num_masked)
    whole = roofline.tokenizer_flops_per_image(dvae, SMALL)
    width = 8 * dvae.encoder_width
    assert whole - saved == 2 * (SMALL.num_patches - num_masked) * width * dvae.vocab_size


def test_the_published_counts_come_out(roofline):
    assert roofline.model_flops_per_image(BASE) == pytest.approx(107.98e9, rel=1e-4)
    assert roofline.model_flops_per_image(LARGE) == pytest.approx(372.79e9, rel=1e-4)
    assert roofline.tokenizer_flops_per_image(DvaeConfig(), BASE) == pytest.approx(
        52.12e9, rel=1e-4
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [(BASE, {"A100": 101.5, "H100": 36.7, "H200": 41.3}),
     (LARGE, {"A100": 340.5, "H100": 119.8, "H200": 137.8})],
    ids=["base", "large"],
)  # fmt: skip
def test_the_designs_floors_come_out(roofline, config, expected):
    """They are of a stream in bf16."""
    for name, ms in expected.items():
        machine = roofline.MACHINES[name]
        floors = roofline.floors(config, 256, machine, residual_bytes=2)
        assert sum(floors.values()) == pytest.approx(ms, abs=0.05)
        tokenizer = roofline.floors(config, 256, machine, tokenizer=DvaeConfig())["tokenizer"]
        assert tokenizer == pytest.approx({"A100": 42.8, "H100": 15.7, "H200": 17.1}[name], abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bf16", "fp32"])
@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_the_stream_between_blocks_has_the_bytes_that_are_counted(roofline, dtype, absolute):
    """What each block of a model takes and gives in a training step, and their gradients."""
    config = replace(SMALL, use_abs_pos_emb=absolute, drop_path_rate=0.1)
    model = BeitForMaskedImageModeling(config).train()
    seen = []

    def watch(block, inputs, output):
        seen.extend((inputs[0].dtype, output.dtype))
        output.register_hook(lambda gradient: seen.append(gradient.dtype))

    for block in model.blocks:
        block.register_forward_hook(watch)
    mask = torch.zeros(2, config.num_patches, dtype=torch.bool)
    mask[:, :5] = True
    index = mask.flatten().nonzero().flatten().int()
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss, _ = model.loss(torch.randn(2, 3, 64, 64), mask, index, tokens)
    loss.backward()
    assert len(seen) == 3 * config.depth
    counted = roofline.Step(config=config, batch=2).residual_bytes
    assert {stream.itemsize for stream in seen} == {counted}


def test_a_stream_of_two_bytes_is_counted_where_it_is_asked_for(roofline, monkeypatch, capsys):
    shown = {}
    for options in ("", "--residual bf16"):
        command = f"roofline.py --tokenizer none --machines H200 {options}"
        monkeypatch.setattr("sys.argv", command.split())
        roofline.main()
        shown[options] = capsys.readouterr().out.splitlines()[-1].split()
    assert float(shown[""][1]) > float(shown["--residual bf16"][1])  # floor ms


def test_savings_shorten_every_stage_they_touch(roofline):
    machine = roofline.MACHINES["H200"]
    options = {"tokenizer": DvaeConfig()}
    plain = roofline.floors(BASE, 256, machine, **options)
    saved = roofline.floors(BASE, 256, machine, savings=True, **options)
    shorter = {stage for stage in plain if saved[stage] < plain[stage]}
    assert shorter == {"tokenizer", "encoder forward", "backward"}
    assert all(saved[stage] == plain[stage] for stage in plain.keys() - shorter)


def test_a_floor_is_the_largest_of_what_binds(roofline):
    machine = roofline.Machine(1e12, 1e11, 1e10)
    work = roofline.Work("head", "x", num_flops=2e9, num_bytes=3e8, num_exps=1e7)
    assert work.floor_ms(machine) == pytest.approx(3.0)
    unmeasured = roofline.Machine(1e12, 1e15)
    assert work.floor_ms(unmeasured) == pytest.approx(2.0)


def test_the_table_adds_up(roofline):
    step = roofline.Step(config=SMALL, batch=3, tokenizer=DvaeConfig(encoder_width=16))
    rows = roofline.table(step, roofline.MACHINES)
    *parts, whole = rows
    for column in ("H200 ms", "GFLOP/img", "MB/img"):
        stages = sum(row[column] for row in parts if row["work"] == "all")
        works = sum(row[column] for row in parts if row["work"] != "all")
        assert whole[column] == pytest.approx(stages)
        assert whole[column] == pytest.approx(works)


def test_the_command_writes_what_it_prints(roofline, tmp_path, monkeypatch, capsys):
    paths = {kind: tmp_path / f"floors.{kind}" for kind in ("csv", "json")}
    command = (
        "roofline.py --batch 256 --machines H200 --residual bf16 "
        f"--csv {paths['csv']} --json {paths['json']}"
    )
    monkeypatch.setattr("sys.argv", command.split())
    roofline.main()
    assert "4384" in capsys.readouterr().out  # images a second with the tokenizer: the design's
    rows = json.loads(paths["json"].read_text())["rows"]
    with paths["csv"].open(newline="") as file:
        assert [row["work"] for row in csv.DictReader(file)] == [row["work"] for row in rows]


def test_a_machine_known_in_bf16_gives_no_floor_in_fp32(roofline, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["roofline.py", "--dtype", "fp32", "--machines", "H200", "here"]
    )
    with pytest.raises(SystemExit):
        roofline.main()
    assert "pass --machines here" in capsys.readouterr().err


def test_ceilings_of_here_are_measured(roofline, monkeypatch, bench):
    roof = bench("timing").Roof(bytes_per_second=2e9, flops_per_second=3e9)
    monkeypatch.setattr(roofline, "measure_roof", lambda *_: roof)
    machines = roofline.machines_named(["here", "A100"], torch.device("cpu"), torch.float32)
    assert machines["here"] == roofline.Machine(3e9, 2e9)
    assert machines["A100"] is roofline.MACHINES["A100"]


def test_the_optimiser_reads_every_parameter(roofline):
    num_parameters = sum(p.numel() for p in BeitForMaskedImageModeling(SMALL).parameters())
    machine = roofline.Machine(1e12, 1e9)
    floor = roofline.floors(SMALL, 1, machine, element_bytes=4)["optimiser"]
    assert floor == pytest.approx(1e3 * 32 * num_parameters / 1e9)
