"""What is wrong with a kernel is told, whichever way it is wrong."""

import pytest
import torch


@pytest.fixture
def exactness(bench):
    return bench("exactness")


@pytest.fixture
def rule(bench):
    return bench("exactness_rule")


@pytest.fixture
def checks(bench, rule, tmp_path):
    """`checks(function, *shape)` is figure -> whether it was right, of one item on a CPU."""
    facts, roof = bench("facts"), bench("timing").Roof(1e10, 1e11)
    place = rule.Place(torch.device("cpu"), roof, 2, torch.float32)

    def run(function, *shape, **options):
        path = tmp_path / "facts.jsonl"
        path.unlink(missing_ok=True)
        said = facts.Facts(path, "run", "kernels")
        function(place, *shape, said, "item", **options)
        found = facts.read_facts(path)
        figures = [f for f in found if f["kind"] == "figure"]
        assert all(f["value"] > 0 and f["floor"] > 0 for f in figures)
        return {f["figure"]: f["right"] for f in found if f["kind"] == "check"}

    return run


SHAPE = (2, 5, 2, 16)  # B, N, H, K


def test_a_right_kernel_is_right(checks, exactness):
    found = checks(exactness.attention, *SHAPE)
    assert list(found) == [
        "tensors that differ the second time",
        *(f"error of {name}" for name in ("out", "dq", "dk", "dv", "dbias")),
    ]
    assert all(found.values())


def attention_with(exactness, change):
    """Attention whose output and gradients go through `change(name, tensor)`."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv, bias):
            ctx.save_for_backward(qkv, bias)
            return change("out", exactness.attention_reference(*qkv.unbind(2), bias))

        @staticmethod
        def backward(ctx, dout):
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            with torch.enable_grad():
                out = exactness.attention_reference(*leaves[0].unbind(2), leaves[1])
            dqkv, dbias = torch.autograd.grad(out, leaves, dout)
            return change("dqkv", dqkv), change("dbias", dbias)

    return lambda qkv, bias, **_: Changed.apply(qkv, bias)


def off(name, wrong):
    return lambda n, t: wrong(t) if n == name else t


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("dbias", lambda t: 1.01 * t, {"error of dbias"}),
        ("dqkv", lambda t: t.index_fill(2, torch.tensor([1]), 0.0), {"error of dk"}),
        ("out", lambda t: t.index_fill(1, torch.tensor([4]), torch.nan), {"error of out"}),
    ],
)
def test_a_wrong_result_is_told_by_its_name(checks, exactness, monkeypatch, name, wrong, told):
    wrongly = attention_with(exactness, off(name, wrong))
    monkeypatch.setattr(exactness, "attention_qkvpacked", wrongly)
    found = checks(exactness.attention, *SHAPE)
    assert told <= {figure for figure, right in found.items() if not right}
    differ = "tensors that differ the second time"
    assert found[differ] or name == "out"  # NaN equals nothing, itself included


def test_what_a_kernel_leaves_unwritten_is_told(checks, exactness, monkeypatch):
    def unwritten(t):
        out = torch.empty_like(t)
        out[:, :4] = t[:, :4]
        return out

    wrongly = attention_with(exactness, off("out", unwritten))
    monkeypatch.setattr(exactness, "attention_qkvpacked", wrongly)
    assert not checks(exactness.attention, *SHAPE)["error of out"]


def test_other_bits_the_second_time_are_told(checks, exactness, monkeypatch):
    calls = []

    def drifting(t):
        calls.append(None)
        return t * (1 + 2.0**-23 * (len(calls) % 2))

    wrongly = attention_with(exactness, off("dqkv", drifting))
    monkeypatch.setattr(exactness, "attention_qkvpacked", wrongly)
    assert not checks(exactness.attention, *SHAPE)["tensors that differ the second time"]


def test_a_nan_after_a_number_is_not_lost(rule, bench, tmp_path):
    errors, zero = rule.Errors(), torch.zeros(2)
    for value in (0.0, torch.nan, 0.0):
        errors.add("out", torch.full((2,), value), zero, zero)
    facts = bench("facts")
    errors.say(facts.Facts(tmp_path / "f.jsonl", "run", "kernels"), "item")
    (check,) = facts.read_facts(tmp_path / "f.jsonl")
    assert check["right"] is False


def test_memory_is_poisoned_and_left_as_it_was(rule):
    for poisoned in (True, False):
        with rule.deterministic(poisoned=poisoned):
            assert torch.utils.deterministic.fill_uninitialized_memory == poisoned
            assert torch.are_deterministic_algorithms_enabled()
            if poisoned:
                assert torch.empty(3).isnan().all()
                assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
