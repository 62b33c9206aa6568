"""The bench of whole steps, on a small model: what it compares is the same, and all there."""

import csv
import gc
import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data.seeds import SampleSeed
from beit_fast.model.config import BeitConfig
from beit_fast.tokenizer.config import DvaeConfig

CPU = torch.device("cpu")
MODEL = BeitConfig(
    img_size=64, embed_dim=32, depth=2, num_heads=2, vocab_size=64, drop_path_rate=0.1
)
DVAE = DvaeConfig(vocab_size=64, encoder_width=8, decoder_width=4, decoder_input_width=1)
NAMES = ["timm", "transformers", "official"]


@pytest.fixture
def pretrain(bench):
    return bench("pretrain")


@pytest.fixture
def candidates(bench):
    return bench("pretrain_candidates")


@pytest.fixture
def measuring(bench):
    return bench("pretrain_measure")


@pytest.fixture
def setting(candidates):
    def make(**changes):
        fields = {"model": MODEL, "batch": 3, "device": "cpu", "dtype": "fp32", "tokenizer": DVAE}
        return candidates.Setting(**{**fields, "input": "synthetic", **changes})

    return make


@pytest.fixture
def machine(bench):
    return bench("roofline").Machine(1e11, 1e10, peak_flops=2e11)


def test_peers_agree_with_ours_before_anything_is_timed(bench):
    bench("peers_pretrain").check(CPU)


def test_a_peer_that_computes_something_else_stops_the_bench(bench, monkeypatch):
    peers = bench("peers_pretrain")

    class Unbiased(peers.TimmForMaskedImageModeling):
        def forward(self, *inputs):
            self.encoder.rel_pos_bias = None
            return super().forward(*inputs)

    monkeypatch.setitem(peers.MODELS, "timm", Unbiased)
    with pytest.raises(SystemExit, match=r"timm's .* nothing is timed"):
        peers.check(CPU)


@pytest.mark.parametrize("name", ["ours", *NAMES])
@pytest.mark.parametrize("tokenizer", [DVAE, None], ids=["live", "given"])
def test_a_step_trains(candidates, setting, name, tokenizer):
    changed = setting(tokenizer=tokenizer)
    candidate = candidates.build(name, changed)
    batch = candidate.prepare(candidates.synthetic_batch(changed))
    before = {n: p.detach().clone() for n, p in candidate.model.named_parameters()}
    loss = candidate.step(candidate.ready(batch))
    assert torch.isfinite(loss)
    still = [n for n, p in candidate.model.named_parameters() if torch.equal(p, before[n])]
    assert not still


def test_all_candidates_predict_the_same_tokens(candidates, setting):
    changed = setting()
    batch = candidates.synthetic_batch(changed)
    views = batch["token_images"].permute(0, 3, 1, 2)
    dvae = candidates.make_tokenizer(changed)
    theirs = candidates.eager_tokens(dvae, views, half=False)
    official = candidates.build("official", changed).prepare(batch)["token_images"]
    assert torch.equal(dvae.encode(views).flatten(1), theirs)
    assert torch.equal(candidates.eager_tokens(dvae, official, half=False), theirs)


def test_every_image_hides_as_many_patches(candidates, setting):
    batch = candidates.synthetic_batch(setting())
    assert (batch["mask"].sum(dim=1) == candidates.num_masked(MODEL)).all()
    assert (batch["masked_index"] >= 0).all()


def test_the_staged_step_is_the_step(candidates, measuring, setting):
    """Cut between encoder and head it gives the weights of the whole step."""
    changed = setting()
    batch = candidates.synthetic_batch(changed)
    weights = []
    for staged in (False, True):
        _, ours = candidates.build_ours(changed)
        torch.manual_seed(1)
        if staged:
            milliseconds = measuring.staged_step(ours, iter([batch]), resident=True)
        else:
            ours.step(ours.ready(batch))
        weights.append(ours.task.model.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    assert list(milliseconds) == [
        "copy", "input", "tokenizer", "encoder forward", "head", "backward", "optimiser"
    ]  # fmt: skip
    assert all(value > 0 for value in milliseconds.values())


def test_stages_that_cannot_be_told_apart_are_an_error(candidates, measuring, setting, monkeypatch):
    changed = setting()
    _, ours = candidates.build_ours(changed)
    loss = torch.zeros((), requires_grad=True)
    monkeypatch.setattr(ours.task, "loss", lambda batch: (loss, {}))
    with pytest.raises(RuntimeError, match="_encode"):
        measuring.staged_step(ours, iter([candidates.synthetic_batch(changed)]), resident=True)


def test_rows_carry_floors_and_utilisation(pretrain, candidates, setting, machine):
    changed = setting()
    rows = pretrain.measure(changed, NAMES, 2, machine, memory=False)
    steps = {row["candidate"]: row for row in rows if row["part"] == "step"}
    assert list(steps) == ["ours", *NAMES]
    flops = pretrain.model_flops_per_image(MODEL, candidates.num_masked(MODEL))
    for row in steps.values():
        assert row["images_per_second"] == pytest.approx(1e3 * changed.batch / row["ms"])
        assert row["mfu_measured"] == pytest.approx(row["images_per_second"] * flops / 1e11)
        assert row["mfu_stated"] == pytest.approx(row["mfu_measured"] / 2)
        assert row["floor"] == pytest.approx(row["floor_ms"] / row["ms"])
    stages = {row["part"]: row for row in rows if row["part"] != "step"}
    floors = [row["floor_ms"] for row in stages.values() if row["floor_ms"] != ""]
    assert sum(floors) == pytest.approx(steps["ours"]["floor_ms"])
    # The stream between blocks is fp32, whatever the products are (tests/bench/test_roofline.py).
    options = {"num_masked": candidates.num_masked(MODEL), "tokenizer": DVAE, "element_bytes": 2}
    wanted = sum(pretrain.floors(MODEL, 3, machine, residual_bytes=4, **options).values())
    (in_bf16, *_) = pretrain.measure(setting(dtype="bf16"), [], 2, machine, memory=False)
    assert in_bf16["floor_ms"] == pytest.approx(wanted)
    assert stages.keys() == {
        "input", "tokenizer", "encoder forward", "head", "backward", "optimiser"
    }  # fmt: skip


def test_a_peer_that_cannot_run_is_named_and_stops_no_other(
    pretrain, setting, machine, monkeypatch, capsys
):
    build = pretrain.build

    def broken(name, setting):
        if name == "timm":
            raise ImportError("no timm here")
        return build(name, setting)

    monkeypatch.setattr(pretrain, "build", broken)
    rows = pretrain.measure(setting(), ["timm", "official"], 2, machine, memory=False)
    steps = {row["candidate"]: row for row in rows if row["part"] == "step"}
    assert list(steps) == ["ours", "official", "timm"]
    assert steps["timm"]["error"] == "ImportError: no timm here"
    assert math.isnan(steps["timm"]["ms"])
    assert math.isnan(steps["timm"]["ratio"])
    assert not any(row["error"] for row in rows if row["candidate"] != "timm")
    print(pretrain.format_results(list(steps.values()), "candidate"))
    *table, last = capsys.readouterr().out.splitlines()
    assert last == "no timm: ImportError: no timm here"
    assert not any("timm" in line for line in table)


def test_a_peer_that_torch_would_leave_eager_is_no_time(pretrain, setting, machine, monkeypatch):
    build = pretrain.build
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)

    def many_shapes(name, setting):
        candidate = build(name, setting)
        if name == "timm":
            step = candidate.step

            def take(batch):
                for size in range(1, 4):
                    compiled(torch.ones(size))
                return step(batch)

            return replace(candidate, step=take)
        return candidate

    monkeypatch.setattr(pretrain, "build", many_shapes)
    # Importing timm makes the limit a million.
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=False):
        rows = pretrain.measure(setting(), ["timm"], 2, machine, memory=False)
    (row,) = [row for row in rows if row["candidate"] == "timm"]
    assert "FailOnRecompileLimitHit" in row["error"]


def test_memory_is_measured_when_times_are_written_and_candidates_are_gone(
    pretrain, setting, machine, bench, monkeypatch, tmp_path
):
    """On a GPU a child finds no room beside its parent's candidates: that must cost no time."""
    path, build, models = tmp_path / "out.csv", pretrain.build, []

    def remembered(name, setting):
        candidate = build(name, setting)
        candidate.model.itself = [candidate.model]  # as what a compiler keeps: no count frees it
        models.append(weakref.ref(candidate.model))
        return candidate

    def measured(function, name, *_, **__):
        with path.open(newline="") as file:
            timed = {row["candidate"] for row in csv.DictReader(file) if float(row["ms"]) > 0}
        assert timed == {"ours", "official"}
        assert len(models) == 2
        assert not any(model() is not None for model in models)
        if name == "official":
            raise RuntimeError("CUDA out of memory")
        return 321.0

    monkeypatch.setattr(pretrain, "build", remembered)
    monkeypatch.setattr(pretrain, "in_own_process", measured)
    names = ("part", "candidate")
    records = bench("records").Records(path, {"machine": "A"}, names)
    gc.disable()  # so that it is the bench that collects
    try:
        pretrain.measure(setting(), ["official"], 2, machine, written=records.add)
    finally:
        gc.enable()
    with path.open(newline="") as file:
        rows = {tuple(row[n] for n in names): row for row in csv.DictReader(file)}
    assert rows["step", "ours"]["peak_mib"] == "321.0"
    assert rows["step", "official"]["peak_mib"] == ""
    assert rows["step", "official"]["error"] == "memory: RuntimeError: CUDA out of memory"
    assert float(rows["step", "official"]["ms"]) > 0
    assert rows["head", "ours"]["peak_mib"] == ""


def test_times_are_on_disk_before_stages_are_measured(pretrain, setting, machine, monkeypatch):
    written = []

    def fail(*_):
        raise RuntimeError("the stages cannot be told apart")

    monkeypatch.setattr(pretrain, "time_stages", fail)
    with pytest.raises(RuntimeError, match="told apart"):
        pretrain.measure(setting(), [], 2, machine, written=written.extend)
    assert [row["candidate"] for row in written] == ["ours"]


def test_files_are_decoded_while_each_candidate_trains(pretrain, setting, machine, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (80, 96, 3), np.uint8)).save(tmp_path / f"{i}.jpg")
    source = pretrain.ManyTimes(pretrain.InMemory(tmp_path))
    rows = pretrain.measure(
        setting(input="jpeg"), ["official"], 2, machine, source=source, memory=False
    )
    parts = [row["part"] for row in rows]
    assert parts[:3] == ["step", "step", "data"]
    assert all(row["ms"] > 0 for row in rows)


def test_the_official_loader_makes_the_floats_of_its_batch(candidates, setting):
    changed = setting(input="jpeg")
    candidate = candidates.build("official", changed)
    sample = candidates.sample_of(changed, candidate)
    assert sample.view.kind == "reference"
    batch = candidates.synthetic_batch(changed)
    views = ("images", "token_images")
    samples = [
        {name: batch[name][i].numpy() for name in views} | {"seed": SampleSeed(0, 0, i)}
        for i in range(changed.batch)
    ]
    made, wanted = sample.collate(samples), candidate.prepare(batch)
    for name in (*views, "mask"):
        assert made[name].dtype == (np.bool_ if name == "mask" else np.float32)
        assert np.array_equal(made[name], wanted[name].numpy()), name


def test_a_profile_is_a_trace_and_a_table(pretrain, setting, tmp_path, capsys):
    pretrain.profile(setting(tokenizer=None), ["timm"], None, tmp_path / "traces")
    for name in ("ours", "timm"):
        trace = json.loads((tmp_path / "traces" / f"{name}.json").read_text())
        assert any("attention" in event.get("name", "") for event in trace["traceEvents"])
    assert capsys.readouterr().out.count("Self CPU time total") == 2


def test_the_command_writes_its_table(pretrain, tmp_path, monkeypatch, bench):
    timing = bench("timing")
    monkeypatch.setattr(pretrain, "beit_config", lambda *_, **__: MODEL)
    monkeypatch.setattr(pretrain, "encoder_of_width", lambda _: DVAE)
    monkeypatch.setattr(pretrain, "measure_roof", lambda *_: timing.Roof(1e10, 1e11))
    path = tmp_path / "out.csv"
    command = f"pretrain.py --device cpu --rounds 2 --batch 2 --peers --no-memory --output {path}"
    monkeypatch.setattr("sys.argv", command.split())
    pretrain.main()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["tokenizer"] for row in rows} == {"none", "dVAE-8"}
    assert all(row["machine"] and row["commit"] and row["torch"] for row in rows)


def test_stages_leave_the_model_as_it_was(candidates, measuring, setting):
    changed = setting()
    ours = measuring.build_staged(changed)
    ours.task.model.forward_features = compiled = ours.task.model.forward_features
    measuring.staged_step(ours, iter([candidates.synthetic_batch(changed)]), resident=True)
    assert ours.task.model.forward_features is compiled
    assert "encode" not in vars(ours.task.tokenizer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compilers and graphs are CUDA's")
@pytest.mark.parametrize(
    "name",
    ["timm-compiled", "transformers-compiled", "official",
     "ours", "ours-graph", "ours-reduce-overhead", "ours-eager"],
)  # fmt: skip
def test_candidates_of_a_gpu_train(candidates, setting, name):
    changed = setting(device="cuda", dtype="bf16")
    candidate = candidates.build(name, changed)
    batch = candidates.to_device(
        candidate.prepare(candidates.synthetic_batch(changed)), torch.device("cuda")
    )
    losses = [candidate.step(candidate.ready(batch)) for _ in range(6)]
    assert all(torch.isfinite(loss) for loss in losses)
