"""metrics.jsonl: what is left out, what is refused."""

import pytest

from beit_fast.train.log import read_metrics


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
