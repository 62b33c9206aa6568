"""A peer that is compiled is compiled in every case, or is an error: never an eager time."""

import ast
import csv
import math
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

BENCH = Path(__file__).resolve().parents[2] / "bench"
CPU = torch.device("cpu")


LIMIT = 3  # of versions of a function; torch's is 8, and importing timm makes it a million


@pytest.fixture(autouse=True)
def _dynamo():
    with torch._dynamo.config.patch(recompile_limit=LIMIT, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def sizes_of(counter, kernels, sizes, per_case=1):
    """Cases over sizes of one compiled function; each case calls it with `per_case` of them."""
    compiled = torch.compile(lambda x: x * 2 + 1, backend=counter, dynamic=False)

    def call(inputs):
        for x in inputs:
            compiled(x)

    for size in sizes:
        inputs = [torch.ones(size, part + 1) for part in range(per_case)]
        made, failed = kernels.try_all(
            {"ours": lambda: list, "compile": lambda inputs=inputs: lambda: call(inputs)}
        )
        yield kernels.Case(f"size{size}", made, 1.0, 1.0, failed=failed)


def test_each_of_many_shapes_is_compiled(bench):
    """More than torch's limit for one function, so that without a reset the last would be eager."""
    kernels, counter = bench("kernels"), CompileCounter()
    seen = []
    for case in kernels.one_by_one(sizes_of(counter, kernels, range(2, 4 + LIMIT))):
        rows = kernels.measure(case, CPU, bench("timing").Roof(1e9, 1e9), rounds=2)
        assert [r["candidate"] for r in rows if not r["error"]] == ["ours", "compile"]
        seen.append(counter.frame_count)
    assert seen == list(range(1, LIMIT + 3))


def test_a_case_beyond_the_limit_is_an_error_with_its_reason(bench):
    kernels = bench("kernels")
    cases = kernels.one_by_one(sizes_of(CompileCounter(), kernels, [3], per_case=LIMIT + 1))
    rows = kernels.measure(next(cases), CPU, bench("timing").Roof(1e9, 1e9), rounds=2)
    (failed,) = [row for row in rows if row["candidate"] == "compile"]
    assert "FailOnRecompileLimitHit" in failed["error"]
    assert math.isnan(failed["ms"])
    assert math.isnan(failed["ratio"])


def test_a_second_size_is_no_program_of_any_size(bench):
    timing = bench("timing")
    symbols = []

    def backend(graph, inputs):
        symbols.extend(x for x in inputs if isinstance(x, torch.SymInt))
        return graph.forward

    compiled = torch.compile(lambda x: x.sum(dim=0) + 1, backend=backend)
    for size in (3, 5, 7):
        timing.fresh_compiler()
        compiled(torch.ones(size, 2))
    assert not symbols


def test_whatever_a_bench_compiles_is_of_fixed_shapes():
    """Read from the sources, for most of it is compiled on a GPU alone."""
    calls = {
        f"{path.name}:{node.lineno}": {k.arg: ast.unparse(k.value) for k in node.keywords}
        for path in sorted(BENCH.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.compile"
    }
    assert len({place.partition(":")[0] for place in calls}) >= 10
    assert [place for place, given in calls.items() if given.get("dynamic") != "False"] == []


@pytest.mark.parametrize("name", ["pretrain", "model"])
def test_a_setting_begins_with_nothing_compiled(bench, name, monkeypatch):
    """Two batch sizes are two settings: the first one's programs do not make the second dynamic."""
    module, calls = bench(name), []
    monkeypatch.setattr(module, "fresh_compiler", lambda: calls.append("fresh"))
    if name == "pretrain":
        monkeypatch.setattr(module, "floors", lambda *_, **__: calls.append("measured") or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.measure(pretrain_setting(module), [], 1, None)
    else:
        monkeypatch.setattr(module, "make_candidate", lambda *_: calls.append("measured") or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.bench("features", ("ours",), None, True, 1)
    assert calls == ["fresh", "measured"]


def pretrain_setting(pretrain):
    from beit_fast.model.config import BeitConfig

    model = BeitConfig(img_size=64, embed_dim=32, depth=1, num_heads=2, vocab_size=64)
    return pretrain.Setting(
        model=model, batch=2, device="cpu", dtype="fp32", tokenizer=None, input="synthetic"
    )


def test_a_models_peer_that_cannot_run_is_a_row_and_memory_loses_no_time(
    bench, monkeypatch, tmp_path
):
    model, records = bench("model"), bench("records")
    setting = model.Setting("small", 224, 2, "cpu", "fp32", 1)
    path = tmp_path / "model.csv"

    def make(name, task, setting, compiled):
        if name == "timm":
            raise torch._dynamo.exc.FailOnRecompileLimitHit("eight versions")
        return model.Candidate(list, list)

    def no_memory(*_, **__):
        assert path.exists(), "memory is measured before the times are written"
        raise MemoryError("none left")

    monkeypatch.setattr(model, "make_candidate", make)
    monkeypatch.setattr(model, "in_own_process", no_memory)
    written = records.Records(path, {"machine": "A"}, ("task", "mode", "pass", "model"))
    model.bench("features", ("ours", "timm", "transformers"), setting, False, 2, written.add)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        if row["model"] == "timm":
            assert row["ms"] == "nan"
            assert "eight versions" in row["error"]
        else:
            assert float(row["ms"]) > 0
            assert ("none left" in row["error"]) == (row["pass"] == "train_step")
            assert row["peak_mib"] == ""
