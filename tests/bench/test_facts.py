"""A fact is on disk before the next begins, and stands beside what was predicted of it."""

import json

import pytest


@pytest.fixture
def facts(bench):
    return bench("facts")


@pytest.fixture
def open_facts(facts, tmp_path):
    def make(**more):
        return facts.Facts(tmp_path / "facts.jsonl", "run", "kernels", **more)

    return make


def figure(**rest):
    return {"stage": "s", "item": "i", "figure": "f", "value": 2.0, "unit": "ms", **rest}


def test_what_was_said_before_a_line_cut_short_is_kept(facts, open_facts, tmp_path):
    said = open_facts()
    said.figure("attention", "forward", 0.25, "ms", floor=0.1)
    path = tmp_path / "facts.jsonl"
    with path.open("a") as file:
        file.write('{"run": "run", "kind": "fig')  # a kill in the middle
    (fact,) = facts.read_facts(path)
    assert (fact["stage"], fact["item"], fact["value"]) == ("kernels", "attention", 0.25)
    assert facts.share_of_floor(fact) == pytest.approx(0.4)


def test_a_fact_behind_a_line_cut_short_is_kept_and_what_is_no_fact_left_out(
    facts, open_facts, tmp_path
):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b'123\nnull\n{"a": 1}\n\xff\xfe\n{"run": "run", "ki')
    open_facts().figure("attention", "forward", 0.25, "ms")
    assert [fact["item"] for fact in facts.read_facts(path)] == ["attention"]


def test_what_is_no_number_is_no_figure(facts, open_facts, tmp_path):
    said = open_facts()
    said.attempt("first", lambda: said.figure("first", "forward", float("nan"), "ms"))
    said.figure("second", "forward", 1.0, "ms", spread=float("nan"), floor=0.5)
    *_, error, figure = facts.read_facts(tmp_path / "facts.jsonl")
    assert error["kind"] == "error"
    assert "spread" not in figure
    assert figure["floor"] == 0.5


@pytest.mark.parametrize(
    ("gpu", "holds"),
    [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H100 PCIe", False), ("NVIDIA H100 NVL", False),
     ("NVIDIA GH100 480GB", False), ("NVIDIA H200", False)],
)  # fmt: skip
def test_a_prediction_is_of_the_whole_card_of_its_name(facts, gpu, holds):
    assert facts.is_called(gpu, "H100") == holds
    assert facts.is_called(gpu, "NVIDIA")


def test_an_error_costs_its_item_alone(facts, open_facts, tmp_path):
    said, done = open_facts(), []

    def fails():
        raise ValueError("too small")

    said.attempt("first", fails)
    said.attempt("second", lambda: done.append("second"))
    assert done == ["second"]
    kinds = [(f["kind"], f["item"]) for f in facts.read_facts(tmp_path / "facts.jsonl")]
    assert kinds == [("begin", "first"), ("error", "first"), ("begin", "second")]


@pytest.mark.parametrize(
    ("message", "alone"),
    [("CUDA error: an illegal memory access was encountered", False), ("capture failed", True)],
)
def test_a_process_that_cannot_go_on_ends(open_facts, message, alone):
    def fails():
        raise RuntimeError(message)

    with pytest.raises(SystemExit, match="first failed"):
        open_facts().attempt("first", fails, alone=alone)


def test_items_that_were_begun_before_are_left_out(open_facts, tmp_path):
    open_facts(skip=frozenset({"first"})).attempt("first", lambda: 1 / 0)
    assert not (tmp_path / "facts.jsonl").exists()


def test_nan_is_never_right_and_stays_legible_json(facts, open_facts, tmp_path):
    open_facts().check("attention", "error of dq", float("nan"), 0.1)
    (line,) = (tmp_path / "facts.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["right"] is False


@pytest.mark.parametrize(
    ("fact", "prediction", "verdict"),
    [
        (figure(), {"on": {"H100": [1, 3]}}, "as predicted"),
        (figure(), {"on": {"H100": [3, 4]}}, "better"),
        (figure(), {"on": {"H100": [0.1, 1]}}, "worse"),
        (figure(unit="images/s"), {"on": {"H100": [3, 4]}}, "worse"),
        (figure(floor=1.0), {"of_floor": [0.4, 0.6]}, "as predicted"),
        (figure(floor=1.0), {"of_floor": [0.6, 0.9]}, "worse"),
        (figure(floor=4.0, unit="GB/s"), {"of_floor": [0.1, 0.4]}, "better"),
        (figure(ratio=1.5), {"ratio": [1.2, 1.4]}, "better"),
        (figure(ratio=0.9, unit="images/s"), {"ratio": [1.2, 1.4]}, "worse"),
        (figure(floor=1.0), {"on": {"A100": [1, 3]}, "of_floor": [0.6, 0.9]}, "worse"),
    ],
)
def test_a_figure_is_judged_by_what_is_better_of_it(facts, fact, prediction, verdict):
    assert facts.expected(fact, prediction, "NVIDIA H100 80GB HBM3").verdict == verdict


def test_nothing_was_predicted_of_a_cpu_or_without_what_it_starts_from(facts):
    assert facts.expected(figure(floor=1.0), {"of_floor": [0.4, 0.6]}, "") is None
    assert facts.expected(figure(), {"of_floor": [0.4, 0.6]}, "NVIDIA H100") is None
    assert facts.expected(figure(), None, "NVIDIA H100") is None


def test_every_prediction_says_how_it_came_about_and_of_which_stage(facts, bench):
    stages = {stage.name for stage in bench("gpu").STAGES} | {"*"}
    for prediction in facts.read_predictions():
        stage, _, _ = prediction["match"].split("/", 2)
        assert stage in stages, prediction
        assert len(prediction["how"]) > 10, prediction
        ranges = [*prediction.get("on", {}).values()]
        ranges += [prediction[name] for name in ("of_floor", "ratio") if name in prediction]
        assert ranges, prediction
        assert all(low < high for low, high in ranges), prediction
