"""All that a GPU can tell, in the order of what it is worth: for whoever has a new GPU node.

    python bench/gpu.py [--minutes 9] [--list] [--only STAGE ...] [--device cpu] [--output FOLDER]

Each stage is a process of its own with a limit of time and a log. What it finds is a JSON line in
FOLDER/facts.jsonl before the next thing begins (bench/facts.py says what is in it). An item that
crashes its process, or says nothing for too long, is noted and left out, and the stage goes on
behind it; a stage that hangs costs itself alone. The end is a table of stages, of figures beside
what was predicted of them (bench/predictions.json) and beside the least time that the machine
allows, and what to do next. With more minutes stages have longer limits, and all of them are
reached: with 9 those that say most, with 60 also the peers whose compilation takes minutes. Exit
code 1: something was wrong, or nothing was found out; what had no time is no fault.

FOLDER is bench/results/gpu-<name> on a GPU, where bench/report.py finds it, and gpu-cpu in the
current folder on a CPU, where all stages run small to show that they run.
"""

import argparse
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from facts import (
    Expected,
    Fact,
    Facts,
    expected,
    of_kind,
    prediction_of,
    read_facts,
    read_predictions,
    share_of_floor,
    trouble_of,
    wrong_facts,
)

HERE = Path(__file__).resolve().parent
MINUTES = 9.0  # for which the limits of the stages are stated
NO_TIME = "no time left"
LEAST_SECONDS = 15  # a stage that has less is not begun: torch alone takes some to import


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    limit_s: int
    about: str
    patience_s: int = 90  # without a new fact: it hangs


STAGES = (
    Stage("machine", 45, "versions, clocks; copy and product rates, the products of a block"),
    Stage("kernels", 170, "every kernel at its real shape: fp64, poisoned memory, same bits twice"),
    Stage("attention", 110, "against flash, cuDNN, efficient, Flex and xformers"),
    Stage("step", 180, "a whole step eager, in a graph, compiled, compiled in a graph: same losses",
          150),
    Stage("residual", 60, "residual and norm against compiled torch, Liger, flash-attention, apex"),
    Stage("head", 90, "masked loss against compiled torch, Liger and cut cross-entropy"),
    Stage("input", 45, "patches and sequence against compiled torch"),
    Stage("tokenizer", 60, "convolutions of the dVAE against cuDNN and compiled torch"),
    Stage("pieces", 60, "the small operators against torch"),
    Stage("steps", 240, "whole steps against the official way, timm, transformers, compiled", 240),
    Stage("steps-tokenizer", 180, "the same with the tokenizer in the step", 180),
    Stage("large", 150, "whole steps of BEiT-L", 150),
    Stage("px384", 150, "whole steps at 384 px", 150),
    Stage("loader", 45, "image pairs a second by threads"),
    Stage("views", 120, "images decoded and both views made on the device, and a step beside it"),
    Stage("profile", 90, "where a step's time goes, kernel by kernel"),
    Stage("tests", 300, "the tests of the kernels, of graphs, prefetching and views", 240),
    Stage("tuning", 300, "every configuration of the attention kernels at N = 197", 300),
)  # fmt: skip


def run_stage(stage: Stage, limit: float, folder: Path, facts: Facts, options) -> Fact:
    """Run the stage for at most `limit` seconds and return how it ended; the fact is written too.

    A process that dies, or is silent for the stage's patience, is begun again behind the item that
    it was at.
    """
    path, log = folder / "facts.jsonl", folder / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    skipped, ended = [], ""
    while True:
        left = limit - (time.monotonic() - begun)
        code, why = _run_once(stage, left, path, log, options, skipped)
        if code == 0:
            ended = "done"
            break
        tried = [f["item"] for f in of_kind(_mine(path, options.run, stage.name), "begin")]
        at = tried[-1] if tried and tried != skipped else None
        told = Facts(path, options.run, stage.name)
        if why == NO_TIME:
            told.say("cut", item=at or "before its first item")
            ended = "cut short"
            break
        known = {f["item"] for f in of_kind(_mine(path, options.run, stage.name), "error")}
        if at not in known:
            what = why or f"its process ended with {_code(code)}, its log with {_last_line(log)!r}"
            told.say("error", item=at or "before its first item", error=what)
        if at is None:  # it cannot begin, or dies between items: it would again
            ended = "failed"
            break
        skipped = tried
        if limit - (time.monotonic() - begun) < LEAST_SECONDS:
            ended = "cut short"
            break
    spent = round(time.monotonic() - begun, 1)
    facts.say("end", item=stage.name, ended=ended, seconds=spent, limit=round(limit, 1))
    return read_facts(path)[-1]


def _run_once(
    stage: Stage, seconds: float, path: Path, log: Path, options, skip: list[str]
) -> tuple[int, str]:
    """(exit code, why it was stopped or ""). The log is appended to."""
    command = [
        sys.executable, str(HERE / "gpu_stages.py"), stage.name, "--facts", str(path), "--run",
        options.run, "--device", options.device,
    ]  # fmt: skip
    command += ["--batch", str(options.batch)] if options.batch else []
    command += ["--skip", *skip] if skip else []
    begun = last = time.monotonic()
    size = path.stat().st_size if path.exists() else 0
    with log.open("ab") as file:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                now = time.monotonic()
                if (grown := path.stat().st_size if path.exists() else 0) != size:
                    size, last = grown, now
                if now - begun > seconds:
                    return _kill(process), NO_TIME
                if now - last > stage.patience_s:
                    return _kill(process), f"silent for {stage.patience_s:.0f} s: it hangs"
        finally:  # whatever ends it, Ctrl-C too: neither it nor what it started goes on alone
            _kill(process)
    return process.returncode, ""


def _kill(process: subprocess.Popen) -> int:
    """End the process and all that it started. One that the device holds on to is left behind."""
    for number, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    return process.poll() or -signal.SIGKILL


def _code(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = (line.strip()[:200] for line in reversed(lines))
    return next((line for line in lines if line and not line.startswith('{"run"')), "")


def _mine(path: Path, run: str, stage: str) -> list[Fact]:
    return [f for f in read_facts(path) if f["run"] == run and f["stage"] == stage]


# --- the end --------------------------------------------------------------------------------------


def summary(facts: list[Fact], not_begun: list[str], gpu: str, again: str) -> str:
    """Stages, what is wrong, figures beside prediction and floor, what to do next.

    `again` is the command without its stages, `gpu` the name, "" for a CPU.
    """
    predictions = read_predictions()
    lines = [
        f"{gpu or 'a CPU'}: {len(facts)} facts",
        "",
        "stage            ended      seconds  figures  right",
    ]
    for end in of_kind(facts, "end"):
        mine = [f for f in facts if f["stage"] == end["item"]]
        checks = list(of_kind(mine, "check"))
        right = f"{sum(f['right'] for f in checks)}/{len(checks)}" if checks else ""
        count = sum(1 for _ in of_kind(mine, "figure"))
        lines.append(
            f"{end['item']:16} {end['ended']:10} {end['seconds']:7.1f}  {count:7}  {right:>5}"
        )
    lines += [f"{name:16} no time" for name in not_begun]
    if wrong := wrong_facts(facts):
        lines += ["", "wrong"]
        lines += [f"  {f['stage']}/{f['item']}: {trouble_of(f)}" for f in wrong]
    if left := [f for f in of_kind(facts, "note") if "left_out" in f]:
        lines += ["", "left out", *(f"  {f['stage']}/{f['item']}: {f['left_out']}" for f in left)]
    if missing := sorted({(f["figure"], f["missing"][:70]) for f in facts if "missing" in f}):
        lines += ["", "peers that are not there", *(f"  {name}: {why}" for name, why in missing)]
    lines += ["", "figures, beside the floor, the peer's time by ours and what was predicted"]
    for fact in of_kind(facts, "figure"):
        found = expected(fact, prediction_of(fact, predictions), gpu)
        lines.append(f"  {figure_line(fact, found)}")
    steps = next_steps(facts, not_begun, gpu, again)
    return "\n".join([*lines, "", "next", *(f"  {line}" for line in steps)])


def figure_line(fact: Fact, found: Expected | None) -> str:
    share, ratio = share_of_floor(fact), fact.get("ratio")
    parts = [f"{fact['stage']}/{fact['item']}/{fact['figure']}: {fact['value']:.4g} {fact['unit']}"]
    parts += [f"{100 * share:.0f} % of the floor"] if share else []
    parts += [f"{ratio:.2f} times ours"] if ratio and fact["figure"] != "ours" else []
    if found:
        where = f" {found.of}" if found.of else ""
        parts.append(f"{found.verdict} ({found.low:.3g} to {found.high:.3g}{where})")
    return ", ".join(parts)


def next_steps(facts: list[Fact], not_begun: list[str], gpu: str, again: str) -> list[str]:
    """What the facts ask for, most pressing first."""
    wrong = {f["stage"] for f in wrong_facts(facts)}
    steps = []
    if gpu and "kernels" in wrong:
        steps.append(
            "a kernel is wrong: compute-sanitizer --tool memcheck python bench/gpu_stages.py "
            "kernels --facts sanitizer.jsonl --batch 2, then --tool racecheck"
        )
    if gpu and "step" in wrong:
        steps.append(
            "a step failed or differs: TORCH_SHOW_CPP_STACKTRACES=1 python bench/gpu_stages.py "
            "step --facts step.jsonl --batch 32"
        )
    if others := sorted(wrong - {"kernels", "step"} if gpu else wrong):
        steps.append(f"see the logs of {', '.join(others)}")
    if _slower_attention(facts, gpu) and "tuning" not in {f["stage"] for f in facts}:
        steps.append(f"attention is slower than predicted: {again} --only tuning")
    cut = [f["item"] for f in of_kind(facts, "end") if f["ended"] == "cut short"]
    if rest := [*cut, *not_begun]:
        steps.append(f"what had no time: {again} --only {' '.join(rest)}")
    if gpu:
        steps.append("commit bench/results, then python bench/report.py --pages --html report.html")
    return steps or ["nothing: all stages run; on a GPU they measure"]


def _slower_attention(facts: list[Fact], gpu: str) -> bool:
    predictions = read_predictions()
    for fact in of_kind(facts, "figure"):
        if fact["stage"] == "kernels" and fact["item"] == "attention N197":
            found = expected(fact, prediction_of(fact, predictions), gpu)
            if found and found.verdict == "worse":
                return True
    return False


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_name() -> str:
    """Asked in a process of its own, so that this one holds no memory of the device."""
    code = "import torch; print(torch.cuda.get_device_name(0))"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if made.returncode:
        sys.exit(
            "torch sees no GPU: pass --device cpu to see all stages run small, or mend the driver: "
            + (made.stderr.strip().splitlines() or ["no message"])[-1]
        )
    return made.stdout.strip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together")
    parser.add_argument("--list", action="store_true", help="print the stages and stop")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", default=names)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, help="images, in place of each stage's own number")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.list:
        for stage in STAGES:
            print(f"{stage.name:16} up to {stage.limit_s:3} s  {stage.about}")
        return
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}: give some time")
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch is {options.batch}: give at least 1")
    end = time.monotonic() + 60 * options.minutes
    # Two runs may begin in one second.
    options.run = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {os.getpid()}"
    gpu = device_name() if options.device == "cuda" else ""
    folder = options.output or (HERE / "results" / f"gpu-{slug(gpu)}" if gpu else Path("gpu-cpu"))
    folder = folder.resolve()  # stages may work elsewhere
    path = folder / "facts.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        parser.error(f"cannot write to {folder}: {error}; pass --output with another folder")
    for number in (signal.SIGTERM, signal.SIGHUP):  # a stage of which nobody knows holds the GPU
        signal.signal(number, _interrupt)
    facts, not_begun = Facts(path, options.run, "gpu"), list(options.only)
    if gpu:
        facts.say("note", item="run", gpu=gpu)
    stopped = False
    try:
        for stage in (stage for stage in STAGES if stage.name in options.only):
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                break
            not_begun.remove(stage.name)
            print(f"{stage.name}: {stage.about}", flush=True)
            more = max(1.0, options.minutes / MINUTES)
            stage = dataclasses.replace(
                stage, limit_s=more * stage.limit_s, patience_s=more * stage.patience_s
            )
            run_stage(stage, min(stage.limit_s, left), folder, facts, options)
    except KeyboardInterrupt:
        stopped = True
    found = [fact for fact in read_facts(path) if fact["run"] == options.run]
    text = summary(found, not_begun, gpu, _command(options))
    print(f"\n{text}\n\nfacts in {path}, logs in {folder / 'logs'}")
    (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
    if stopped:
        sys.exit(130)
    failed = any(f["ended"] == "failed" for f in of_kind(found, "end"))
    sys.exit(bool(wrong_facts(found)) or failed or not any(of_kind(found, "end")))


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _command(options: argparse.Namespace) -> str:
    """The command of this run without its stages."""
    parts = ["python bench/gpu.py"]
    parts += ["--device cpu"] if options.device == "cpu" else []
    parts += [f"--minutes {options.minutes:g}"] if options.minutes != MINUTES else []
    parts += [f"--batch {options.batch}"] if options.batch else []
    parts += [f"--output {options.output}"] if options.output else []
    return " ".join(parts)


if __name__ == "__main__":
    main()
