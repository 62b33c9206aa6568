"""metrics.jsonl: what is read, and what is left out and said."""

import pytest
import torch

from beit_fast.train.log import METRICS, Log, Meter, _read_lines, read_metrics
from beit_fast.train.world import World
from damaged import flipped

CPU = torch.device("cpu")


LINES = [
    b'{"step": 1, "loss": 1.0}',
    b'{"step": 1, "test_loss": 2.0}',
    b'{"step": 3, "loss": 0.5}',
    b'{"step": 4, "loss": NaN, "lr": 1}',
]
DAMAGED_LINES = [
    b'{"step": 2, "lo',
    b'{"step": 2, "lo\xffs": 0.5}',
    b'{"step": 2, "loss": 0.5 }}',
    b"3",
    b"[]",
    b"{}",
    b"null",
    b'{"step": "2"}',
    b'{"step": true}',
    b'{"step": 2.5}',
    b'{"step": 2, "loss": "0.5"}',
    b'{"step": 2, "loss": [0.5]}',
    b"[" * 100_000,
    b'{"step": 1' + b"0" * 5000 + b"}",
]


@pytest.mark.promise("R24")
@pytest.mark.parametrize("damaged", DAMAGED_LINES, ids=lambda line: repr(line[:24]))
@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_damaged_line_is_named_once_and_the_others_count(damaged, number, tmp_path, caplog):
    path = tmp_path / METRICS
    path.write_bytes(b"\n".join([*LINES[: number - 1], damaged, *LINES[number - 1 :], b""]))
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 4]
    assert caplog.messages == [f"{path}: line {number} is damaged, and left out"]
    caplog.clear()
    # A resume keeps the others as they are, but for those past its step, and the damaged aside.
    Log(tmp_path, title="run", start=3, num_steps=5).close()
    assert path.read_bytes() == b"\n".join([*LINES[:3], b""])
    assert (tmp_path / "metrics.damaged").read_bytes() == damaged + b"\n"
    said = f"{path}: line {number} is damaged: moved to metrics.damaged, the others count"
    assert caplog.messages == [said]
    caplog.clear()
    assert [record["step"] for record in read_metrics(path)] == [1, 3]
    Log(tmp_path, title="run", start=3, num_steps=5).close()
    assert (tmp_path / "metrics.damaged").read_bytes() == damaged + b"\n"
    assert not caplog.messages


@pytest.mark.promise("R24")
def test_every_flipped_bit_costs_a_line_at_most(tmp_path):
    path = tmp_path / METRICS
    path.write_bytes(b"\n".join([*LINES, b""]))
    for place in range(path.stat().st_size):
        for bit in range(8):
            with flipped(path, place, bit):
                lines, damaged = _read_lines(path)
                kept = {line for line, _ in lines}
                assert kept | {*damaged.values(), b""} == {*path.read_bytes().split(b"\n"), b""}
                # A flipped end of a line makes one damaged line of two.
                assert len(kept & set(LINES)) >= len(LINES) - 2, (place, bit)
                assert len(damaged) <= 2, (place, bit)


@pytest.mark.promise("R24")
def test_many_damaged_lines_are_one_warning_and_blank_ones_none(tmp_path, caplog):
    path = tmp_path / METRICS
    path.write_bytes(b"\n\n" + LINES[0] + b"\n\n" + b"x\n" * 9 + LINES[2])
    assert [record["step"] for record in read_metrics(path)] == [1, 3]
    assert caplog.messages == [f"{path}: lines 5, 6, 7, 8, 9 and 4 more are damaged, and left out"]


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
