"""The bench of kernels checks before it times, and has a case for every kernel."""

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def kernels(bench):
    return bench("kernels")


@pytest.mark.parametrize(
    "piece", ["linear", "rel_pos_bias", "layer_norm", "scale_residual", "drop_path"]
)
def test_a_piece_is_right_and_is_timed_in_both_passes(kernels, bench, piece):
    pieces = bench("peers_pieces")
    made = pieces.PIECES[piece](2, 64, CPU, torch.float32)
    pieces._check(made)
    for part in pieces.PASSES:
        runs = {"ours": pieces._bind(part, made.ours, made.inputs)}
        candidates, failed = kernels.try_all(runs)
        assert list(candidates) == ["ours"]
        assert not failed


def test_a_wrong_operator_is_not_timed(kernels, bench):
    pieces = bench("peers_pieces")
    made = pieces.PIECES["layer_norm"](2, 64, CPU, torch.float32)
    wrong = pieces.Piece(made.inputs, lambda x, w, b: made.eager(x, w, b) * 1.001, made.eager, 1.0)
    case = kernels.Case("wrong", {"ours": list}, 1.0, 0.0, check=lambda: pieces._check(wrong))
    with pytest.raises(AssertionError, match="nothing is timed"):
        kernels.measure(case, CPU, bench("timing").Roof(1e9, 1e9), rounds=2)


def test_a_check_is_against_fp32_without_tf32(kernels, bench):
    seen = []

    def check():
        seen.append(
            (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.allow_tf32)
        )

    case = kernels.Case("case", {"ours": list}, 1.0, 0.0, check=check)
    before = torch.backends.cudnn.conv.fp32_precision
    assert before == "tf32"
    kernels.measure(case, CPU, bench("timing").Roof(1e9, 1e9), rounds=2)
    ((convolutions, products),) = seen
    assert convolutions != "tf32"
    assert products is False
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_a_case_without_ours_says_why(kernels, bench):
    case = kernels.Case("case", {"eager": list}, 1.0, 0.0, failed={"ours": "out of memory"})
    with pytest.raises(RuntimeError, match="case: ours: out of memory: nothing to compare with"):
        kernels.measure(case, CPU, bench("timing").Roof(1e9, 1e9), rounds=2)


def test_every_case_of_a_cpu_has_a_check(bench):
    """Of the areas whose cases are cheap to make; attention's and the residual's have theirs."""
    peers = bench("peers_cross_entropy")
    peers.CPU_SHAPES, peers.FEATURES, peers.V = ((2, 32, 64),), 32, 64
    made = list(peers.cases(CPU, torch.float32, ""))
    assert [case.name for case in made if case.name.startswith("argmax")]
    for case in made:
        assert case.check is not None, case.name
        case.check()


def test_a_worse_score_is_noticed(bench, monkeypatch):
    peers = bench("peers_cross_entropy")
    features, weight, bias = torch.randn(1, 2, 2, 8), torch.randn(16, 8), torch.zeros(16)
    peers._check_argmax(features, weight, bias, None)
    worst = torch.nn.functional.linear(features.flatten(0, 2), weight).argmin(dim=-1)
    monkeypatch.setattr(peers, "linear_argmax", lambda *_, **__: worst)
    with pytest.raises(AssertionError, match="below the best"):
        peers._check_argmax(features, weight, bias, None)


def test_gather_and_scatter_are_held_against_fp64(bench):
    """The kernels themselves: interpreted, or on the GPU where there is one."""
    peers = bench("peers_cross_entropy")
    if not peers.can_launch(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")):
        pytest.skip("no Triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peers._check_streaming(peers._inputs(2, 32, 64, torch.float32, device), torch.float32)


def test_what_is_further_from_the_reference_than_two_roundings_is_not_timed(kernels):
    theirs = torch.randn(64, 64)
    kernels.require_close([theirs, theirs.bfloat16()], [theirs, theirs.bfloat16()])
    kernels.require_close([theirs.bfloat16()], [theirs], torch.bfloat16)
    wrong = ((theirs.bfloat16(), None), (1.1 * theirs, torch.bfloat16), (theirs * torch.nan, None))
    for ours, dtype in wrong:
        with pytest.raises(AssertionError, match="from the reference: nothing is timed"):
            kernels.require_close([theirs, ours], [theirs, theirs], dtype)


def test_a_pass_is_what_it_is_called(kernels):
    x, runs = torch.randn(3, requires_grad=True), []

    def forward():
        runs.append(torch.is_grad_enabled())
        return 2 * x

    calls = {}
    for part in ("forward", "both", "backward"):
        call = kernels.run_of(part, forward, [x], torch.ones(3))
        runs.clear()
        results = [call() for _ in range(2)]
        calls[part] = list(runs)
        want = 2 * x if part == "forward" else torch.full((3,), 2.0)
        for result in results:
            assert torch.equal(result if part == "forward" else result[0], want)
    assert calls == {"forward": [False] * 2, "both": [True] * 2, "backward": []}
