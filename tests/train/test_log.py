"""metrics.jsonl: what is left out, what is refused."""

import pytest

from beit_fast.train.log import METRICS, Log, read_metrics


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
