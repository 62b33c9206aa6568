"""Two ranks for 2,000 steps: nothing grows, and the last step is as fast as the first."""

import itertools
import json
import pickle
import statistics
import subprocess

import pytest

import soak_ranks
from task_runs import TWO_RANKS, steps_of

STEPS = 2_000


def step_seconds(rows: list[dict[str, float]]) -> float:
    return statistics.median(b["time"] - a["time"] for a, b in itertools.pairwise(rows))


@pytest.mark.soak
@pytest.mark.promise("R27")
def test_nothing_grows_in_two_thousand_steps(pretrain_config, tmp_path):
    run = {"steps": STEPS, "log_every": 10, "save_every": 100, "ema_decay": 0.99}
    config = pretrain_config(run=run)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(config))
    command = [*TWO_RANKS, soak_ranks.__file__, str(tmp_path / "config.pkl"), str(tmp_path)]
    done = subprocess.run(command, timeout=900, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps_of(tmp_path / "run")[-1] == STEPS
    rows = json.loads((tmp_path / "grown.json").read_text())
    assert len(rows) == STEPS // soak_ranks.EVERY

    tenth = len(rows) // 10
    first, last = rows[tenth : 2 * tenth], rows[-tenth:]  # the very first fills caches
    grown = {
        "memory": max(row["memory"] for row in last) / max(row["memory"] for row in first),
        "step": step_seconds(last) / step_seconds(first),
    }
    print(json.dumps({"first": first[0], "last": last[-1], "ratios": grown}))
    assert grown["memory"] < 1.05
    assert grown["step"] < 1.2
    for kind in ("files", "threads", "children"):
        held = [statistics.median(row[kind] for row in part) for part in (first, last)]
        assert held[0] == held[1], kind
