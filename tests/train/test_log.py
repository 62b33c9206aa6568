"""metrics.jsonl: what is left out, what is refused."""

import pytest
import torch

from beit_fast.train.log import METRICS, Log, Meter, read_metrics
from beit_fast.train.world import World

CPU = torch.device("cpu")


def test_a_last_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo\xff')
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]


@pytest.mark.parametrize("line", ["3", "[]", "{}", '{"step": "x"}'])
def test_a_line_of_something_else_is_named_and_removing_it_helps(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is of no step: remove it"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"step": 3}\n')
    assert [record["step"] for record in read_metrics(path)] == [1, 3]


def test_a_resume_keeps_lines_as_they_are_and_those_after_a_broken_one(tmp_path):
    lines = ['{"step": 1, "loss": 1.0}', '{"step": 1, "test_loss": 2.0}', '{"step": 2, "lo']
    lines += ['{"step": 3, "loss": 0.5}', '{"step": 4, "loss": 0.4}']
    path = tmp_path / METRICS
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 4]
    Log(tmp_path, title="run", start=3, num_steps=5).close()
    kept = path.read_text(encoding="utf-8").splitlines()
    assert kept == [lines[0], lines[1], lines[3]]


def test_a_line_behind_one_cut_short_is_its_own(tmp_path):
    log = Log(tmp_path, title="run", start=0, num_steps=5)
    log.line(1, {"loss": 1.0})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 2, "lo')
    log.line(3, {"loss": 0.5})
    log.evaluation(3, {"test_loss": 0.4})
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path / METRICS)] == [1, 3]
    assert read_metrics(tmp_path / METRICS)[-1]["test_loss"] == 0.4


def test_an_unread_window_goes_on_with_any_number_of_ranks(monkeypatch):
    def meter(world, saved):
        made = Meter(CPU)
        made.load_state(saved, world)
        return made

    def means(made):
        return {name: float(value) for name, value in made.means().items()}

    first, second = Meter(CPU), Meter(CPU)
    for value in (1.0, 2.0):
        first.add(loss=torch.tensor(value))
        second.add(loss=torch.tensor(0.1 + 10 * value))
    two = [World(rank, 2, CPU) for rank in (0, 1)]
    windows = [made.window() for made in (first, second)]
    monkeypatch.setattr(World, "gather", lambda self, value: windows)
    saved = first.state(two[0])
    assert saved["meter_sum/loss"].tolist() == [window["loss"] for window in windows]
    assert [means(meter(world, saved)) for world in two] == [means(first), means(second)]
    on_one = means(meter(World(0, 1, CPU), saved))
    assert on_one["loss"] == pytest.approx((1.5 + 15.1) / 2, rel=1e-6)
    on_three = [means(meter(World(rank, 3, CPU), saved)) for rank in range(3)]
    assert on_three == [on_one] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_window_of_a_version_that_kept_one_ranks_is_taken_by_all(rank):
    made = Meter(CPU)
    saved = {"meter_sum/loss": torch.tensor(3.0).double(), "meter_count/loss": torch.tensor(2)}
    made.load_state(saved, World(rank, 2, CPU))
    assert float(made.means()["loss"]) == 1.5
