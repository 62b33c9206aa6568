"""A crash or a hang costs its item alone; on a CPU every stage runs, small."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(bench):
    return bench("gpu")


@pytest.fixture
def drive(gpu, bench, tmp_path, monkeypatch):
    """`drive(body)` runs a stage whose process has `facts` and that body; gives how it ended and
    (kind, item) of its facts."""
    facts = bench("facts")
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(gpu, "HERE", tmp_path / "bench")
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)

    def run(body: str, *, limit: float = 30, patience: float = 20):
        head = f"""
            import os, signal, subprocess, sys, time
            sys.path.insert(0, {str(ROOT / "bench")!r})
            from pathlib import Path
            from facts import Facts
            skip = sys.argv[sys.argv.index("--skip") + 1:] if "--skip" in sys.argv else []
            facts = Facts(Path(sys.argv[3]), sys.argv[5], sys.argv[1], frozenset(skip))
        """
        script = textwrap.dedent(head) + textwrap.dedent(body)
        (tmp_path / "bench" / "gpu_stages.py").write_text(script)
        stage = gpu.Stage("kernels", limit, "", patience)
        options = SimpleNamespace(run="run", device="cpu", batch=None)
        driver = facts.Facts(tmp_path / "facts.jsonl", "run", "gpu")
        end = gpu.run_stage(stage, limit, tmp_path, driver, options)
        found = facts.read_facts(tmp_path / "facts.jsonl")
        told = [(f["kind"], f["item"]) for f in found if f["kind"] in ("figure", "error")]
        return end["ended"], told, found

    return run


def test_an_item_that_kills_its_process_costs_itself_alone(drive):
    ended, told, found = drive("""
        facts.attempt("first", lambda: facts.figure("first", "time", 1.0, "ms"))
        facts.attempt("second", lambda: os.kill(os.getpid(), signal.SIGSEGV))
        facts.attempt("third", lambda: facts.figure("third", "time", 1.0, "ms"))
    """)
    assert ended == "done"
    assert told == [("figure", "first"), ("error", "second"), ("figure", "third")]
    (error,) = (f["error"] for f in found if f["kind"] == "error")
    assert "SIGSEGV" in error


def test_an_item_that_hangs_is_killed_with_what_it_started(drive, tmp_path):
    ended, told, found = drive(
        """
        def hangs():
            child = subprocess.Popen(["sleep", "600"])
            facts.say("note", item="second", pid=child.pid)
            time.sleep(600)
        facts.attempt("first", lambda: facts.figure("first", "time", 1.0, "ms"))
        facts.attempt("second", hangs)
        facts.attempt("third", lambda: facts.figure("third", "time", 1.0, "ms"))
        """,
        patience=3,
    )
    assert ended == "done"
    assert told == [("figure", "first"), ("error", "second"), ("figure", "third")]
    (pid,) = (f["pid"] for f in found if "pid" in f)
    assert not _lives(pid)


def test_a_stage_without_time_keeps_what_it_found(drive):
    begun = time.monotonic()
    ended, told, found = drive(
        """
        facts.attempt("first", lambda: facts.figure("first", "time", 1.0, "ms"))
        facts.attempt("second", lambda: time.sleep(600))
        """,
        limit=4,
    )
    assert ended == "cut short"
    assert told == [("figure", "first")]  # that time is over is no fault
    assert [f["item"] for f in found if f["kind"] == "cut"] == ["second"]
    assert time.monotonic() - begun < 60


def test_a_stage_that_cannot_begin_fails_with_the_reason_and_is_not_tried_again(drive):
    ended, told, found = drive("import no_such_package")
    assert ended == "failed"
    assert told == [("error", "before its first item")]
    assert "No module named 'no_such_package'" in next(f["error"] for f in found if "error" in f)


def test_what_a_crashed_item_started_is_killed_too(drive):
    ended, told, found = drive("""
        def crashes():
            child = subprocess.Popen(["sleep", "600"])
            facts.say("note", item="first", pid=child.pid)
            os.kill(os.getpid(), signal.SIGSEGV)
        facts.attempt("first", crashes)
    """)
    assert (ended, told) == ("done", [("error", "first")])
    (pid,) = (f["pid"] for f in found if "pid" in f)
    assert not _lives(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_stage_too_and_leaves_a_summary(tmp_path, number):
    command = _command("--device", "cpu", "--only", "loader", "--output", str(tmp_path))
    driver = subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL)
    _wait_for(lambda: (tmp_path / "facts.jsonl").exists() and _stages(tmp_path), 60)
    (stage,) = _stages(tmp_path)
    driver.send_signal(number)
    assert driver.wait(30) == 130
    assert not _lives(stage)
    assert (tmp_path / "summary.txt").exists()


def test_two_wrong_losses_are_wrong(bench):
    farthest = bench("gpu_steps").farthest
    assert farthest([9.0, 8.0], [9.0, 8.0]) == 0
    assert farthest([9.0, 4.0], [9.0, 8.0]) == 0.5
    assert farthest([9.0, float("nan")], [9.0, 8.0]) == float("inf")
    assert farthest([9.0, 8.0], [9.0, float("nan")]) == float("inf")


def test_an_error_that_was_told_is_not_told_again(drive):
    ended, told, _ = drive("""
        def breaks():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        facts.attempt("first", breaks)
        facts.attempt("second", lambda: facts.figure("second", "time", 1.0, "ms"))
    """)
    assert ended == "done"
    assert told == [("error", "first"), ("figure", "second")]


def test_what_to_do_next_follows_from_the_facts(gpu):
    machine = {"kind": "note", "stage": "machine", "item": "conditions", "run": "r",
               "machine": "NVIDIA H100 80GB HBM3", "capability": "9.0"}  # fmt: skip
    slow = {"kind": "figure", "stage": "kernels", "item": "attention N197", "figure": "forward",
            "value": 0.4, "unit": "ms", "floor": 0.09, "run": "r"}  # fmt: skip
    wrong = {"kind": "check", "stage": "kernels", "item": "head D768", "figure": "error of dx",
             "value": 1.0, "allowed": 0.1, "right": False, "run": "r"}  # fmt: skip
    end = {"kind": "end", "stage": "gpu", "item": "kernels", "ended": "cut short",
           "seconds": 1.0, "limit": 1, "run": "r"}  # fmt: skip
    name, again = machine["machine"], "python bench/gpu.py --minutes 20"
    assert gpu.next_steps([machine], [], name, again) == [
        "commit bench/results, then python bench/report.py --pages --html report.html"
    ]
    steps = gpu.next_steps([machine, slow, wrong, end], ["large"], name, again)[:-1]
    assert [step.partition(":")[0] for step in steps] == [
        "a kernel is wrong", "attention is slower than predicted", "what had no time"
    ]  # fmt: skip
    assert steps[-1].endswith("python bench/gpu.py --minutes 20 --only kernels large")
    text = gpu.summary([machine, slow, wrong, end], ["large"], name, again)
    assert "kernels/head D768: error of dx is 1.0, allowed 0.1" in text
    assert "worse (0.13 to 0.17)" in text
    assert "large            no time" in text


def test_stages_are_those_that_can_be_run(gpu, bench):
    names = [stage.name for stage in gpu.STAGES]
    assert len(set(names)) == len(names)
    assert set(names) == set(bench("gpu_stages").RUNS)


def test_without_a_gpu_it_says_what_to_pass(tmp_path):
    if _has_gpu():
        pytest.skip("there is a GPU")
    done = _run("--only", "machine", "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "pass --device cpu" in done.stderr
    assert not (tmp_path / "out").exists()


def test_on_a_cpu_every_stage_runs_and_every_figure_was_predicted(bench, tmp_path):
    facts = bench("facts")
    # What it compiles is in a folder of its own: tests beside it compile too.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = _run("--device", "cpu", "--minutes", "9", "--output", str(tmp_path), **cache)
    found = facts.read_facts(tmp_path / "facts.jsonl")
    wrong = "\n".join(map(json.dumps, facts.wrong_facts(found)))
    assert not wrong, f"{wrong}\n{done.stdout[-3000:]}"  # as text: pytest cuts lists short
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ends = {f["item"]: f["ended"] for f in facts.of_kind(found, "end")}
    assert set(ends.values()) == {"done"}, ends
    assert len(ends) == len(bench("gpu").STAGES)
    predictions = facts.read_predictions()
    figures = list(facts.of_kind(found, "figure"))
    without = [f for f in figures if facts.prediction_of(f, predictions) is None]
    assert not without, [f"{f['stage']}/{f['item']}/{f['figure']}" for f in without]
    measuring = {f["stage"] for f in figures}
    assert measuring == set(ends) - {"tests", "tuning"}
    assert "facts in" in done.stdout
    assert "nothing: all stages run" in done.stdout


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """bench/gpu.py as a user has it: without Triton's interpreter, which the tests turn on."""
    environment = {**_environment(), **variables}
    return subprocess.run(
        _command(*arguments), env=environment, cwd=ROOT, capture_output=True, text=True
    )


def _command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "bench" / "gpu.py"), *arguments]


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def _stages(folder: Path) -> list[int]:
    """The process of the stage that writes there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if str(folder / "facts.jsonl") in words:
                found.append(int(path.parent.name))
    return found


def _wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
