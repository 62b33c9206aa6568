import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.kernels._triton import record
from beit_fast.kernels.head import linear_argmax as module
from beit_fast.kernels.head.linear_argmax import (
    PRECISIONS,
    linear_argmax,
    linear_argmax_reference,
    round_operand,
    split_fp16,
)

backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with torch.device(device):
        yield


def whole_numbers(*shape, high=4):
    """Small integers: exact in every precision, so that all implementations give the same ids."""
    return torch.randint(-high, high + 1, shape).float()


# Rows: below and above a tile; V: one class, a tail, tiles and a tail; D: below a step and a tail.
SHAPES = [(1, 1, 8), (5, 50, 16), (70, 130, 32), (130, 300, 72), (3, 1000, 40)]


@backends
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("M", "V", "D"), SHAPES, ids=[f"M{M}-V{V}-D{D}" for M, V, D in SHAPES])
def test_finds_the_best_class_ties_to_the_lowest(backend, precision, M, V, D):
    x, weight, bias = whole_numbers(M, D), whole_numbers(V, D, high=1), whole_numbers(V)
    want = linear_argmax_reference(x, weight, bias)
    ids = linear_argmax(x, weight, bias, precision=precision, backend=backend)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, want)
    without = linear_argmax(x, weight, precision=precision, backend=backend)
    assert torch.equal(without, linear_argmax_reference(x, weight))


@backends
@pytest.mark.parametrize("V", [50, 300])
def test_equal_scores_go_to_the_lowest_id(backend, V):
    weight = torch.zeros(V, 16)
    assert linear_argmax(torch.ones(3, 16), weight, backend=backend).tolist() == [0, 0, 0]
    weight[[V - 1, V - 2, 9]] = 1
    assert linear_argmax(torch.ones(3, 16), weight, backend=backend).tolist() == [9, 9, 9]
    bias = torch.full((V,), -torch.inf)
    assert linear_argmax(torch.ones(2, 16), weight, bias, backend=backend).tolist() == [0, 0]


@backends
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, interpreting
def test_nan_counts_as_the_largest_as_in_torch(backend):
    bias = torch.zeros(300)
    x, weight = torch.zeros(1, 16), torch.zeros(300, 16)
    for places, values in (([7, 250, 251], [9.0, torch.nan, torch.nan]),
                           ([3, 9], [torch.inf, torch.nan]), ([290], [torch.inf])):  # fmt: skip
        bias[:] = 0
        bias[places] = torch.tensor(values)
        want = linear_argmax_reference(x, weight, bias)
        assert torch.equal(linear_argmax(x, weight, bias, backend=backend), want)


@backends
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_only_listed_rows_are_scored(backend, dtype):
    x, weight, bias = torch.full((2, 9, 16), torch.nan), whole_numbers(50, 16), whole_numbers(50)
    x.view(-1, 16)[[3, 17, 8]] = whole_numbers(3, 16)
    index = torch.tensor([3, -1, 17, 8, 3, -1], dtype=dtype)
    ids = linear_argmax(x, weight, bias, index, backend=backend)
    assert torch.equal(ids, linear_argmax_reference(x, weight, bias, index))
    assert ids.tolist()[1] == ids.tolist()[5] == -1


@backends
@pytest.mark.parametrize("listed", [False, True], ids=["all", "listed"])
def test_channels_may_come_first_in_memory(backend, listed):
    x = whole_numbers(2, 16, 3, 5).permute(0, 2, 3, 1)
    weight = whole_numbers(50, 16)
    index = torch.tensor([29, -1, 0, 14], dtype=torch.int32) if listed else None
    ids = linear_argmax(x, weight, None, index, backend=backend)
    assert ids.shape == ((4,) if listed else (2, 3, 5))
    assert torch.equal(ids, linear_argmax_reference(x, weight, None, index))


@backends
@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16)])
def test_no_rows_give_no_ids(backend, shape):
    x = torch.zeros(shape)
    assert linear_argmax(x, torch.ones(4, 16), backend=backend).shape == shape[:-1]
    nothing = torch.zeros(0, dtype=torch.int32)
    assert linear_argmax(x, torch.ones(4, 16), None, nothing, backend=backend).shape == (0,)
    padding = torch.full((2,), -1)
    assert linear_argmax(x, torch.ones(4, 16), None, padding, backend=backend).tolist() == [-1, -1]


def test_an_index_out_of_range_is_refused_on_a_cpu_and_harmless_on_a_device():
    x, weight = whole_numbers(4, 16), whole_numbers(50, 16)
    for wrong in (4, -2):
        with pytest.raises(ValueError, match=rf"index\[1\] is {wrong}, and x has 4 rows"):
            linear_argmax(x.cpu(), weight.cpu(), None, torch.tensor([0, wrong], device="cpu"))
        ids = linear_argmax(
            x, weight, None, torch.tensor([0, wrong]), backend="triton"
        )  # fmt: skip
        assert ids[1] == -1


def test_the_torch_back_end_gives_the_same_in_any_portions(monkeypatch):
    x, weight = torch.randn(30, 16), torch.randn(50, 16)
    index = torch.randint(-1, 30, (40,))
    want = linear_argmax(x, weight, None, index)
    monkeypatch.setattr(module, "SCORES_AT_A_TIME", 350)
    assert torch.equal(linear_argmax(x, weight, None, index), want)


class _LargestTensor(TorchDispatchMode):
    num_elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_the_scores_never_exist_all_at_once(monkeypatch):
    monkeypatch.setattr(module, "SCORES_AT_A_TIME", 40_000)
    x, weight = torch.randn(200, 32), torch.randn(1000, 32)  # 200,000 scores
    with _LargestTensor() as seen:  # shows what an operator does only where it is called directly
        module.linear_argmax_torch(x, weight, None, None, "fp32")
    assert seen.num_elements == 40_000
    x, weight = torch.empty(2000, 32, device="meta"), torch.empty(1000, 32, device="meta")
    with record(), _LargestTensor() as seen:
        module.linear_argmax_triton(x, weight, None, None, "tf32")
    assert seen.num_elements <= max(x.numel(), 2000 * 8)  # one value for each tile of 128


def test_operands_are_rounded_to_their_precision():
    value = torch.tensor([1 + 2**-8 + 2**-20, 1 + 2**-11 + 2**-20, -(1 + 2**-11 + 2**-20)])
    rounded = {p: round_operand(value, p).tolist() for p in PRECISIONS}
    assert rounded["fp32"] == rounded["tf32x3"] == value.tolist()
    assert rounded["tf32"] == rounded["fp16"] == [1 + 2**-8, 1 + 2**-10, -(1 + 2**-10)]
    assert rounded["bf16"] == [1 + 2**-7, 1, -1]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_rounds_what_the_torch_back_end_rounds(precision, dtype):
    x, weight = torch.randn(60, 64).to(dtype), torch.randn(300, 64)
    ids = [linear_argmax(x, weight, precision=precision, backend=b) for b in ("torch", "triton")]
    assert torch.equal(*ids)


def test_fewer_bits_change_more_ids():
    x, weight = torch.randn(400, 64), torch.randn(2000, 64)
    want = linear_argmax(x, weight)
    changed = {p: (linear_argmax(x, weight, precision=p) != want).sum() for p in PRECISIONS}
    assert changed["fp32"] == changed["tf32x3"] == 0
    assert changed["bf16"] > changed["tf32"]
    assert changed["bf16"] < 40


@backends
def test_autocast_changes_nothing(backend):
    x, weight = torch.randn(60, 64), torch.randn(300, 64)
    with torch.autocast(x.device.type, torch.bfloat16):
        ids = linear_argmax(x, weight, backend=backend)
    assert torch.equal(ids, F.linear(x, weight).argmax(dim=1))


@backends
def test_compiles_in_one_graph_and_carries_no_gradient(backend):
    x, weight = whole_numbers(2, 9, 16).requires_grad_(), whole_numbers(50, 16).requires_grad_()
    index = torch.tensor([3, -1])
    compiled = torch.compile(
        lambda x, w: linear_argmax(x * 1, w, None, index, backend=backend),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    ids = compiled(x, weight)
    assert not ids.requires_grad
    assert torch.equal(ids, linear_argmax_reference(x, weight, None, index))


@backends
def test_the_operator_keeps_what_it_promises_the_compiler(backend):
    x, weight = torch.randn(2, 9, 16), torch.randn(50, 16)
    for index in (None, torch.tensor([3, -1])):
        torch.library.opcheck(
            torch.ops.beit_fast.linear_argmax.default, (x, weight, None, index, "fp32", backend)
        )


def test_needs_no_value_on_the_host():
    x = torch.empty(2, 9, 16, device="meta").transpose(0, 1)
    weight = torch.empty(50, 16, device="meta")
    index = torch.empty(7, dtype=torch.int32, device="meta")
    with record() as launches:
        assert module._linear_argmax(x, weight, None, index, "tf32", "triton").shape == (7,)
    assert len(launches) == 2


def test_what_has_no_kernel_is_refused_by_name_and_runs_on_torch_without_one():
    x = torch.randn(4, 16, dtype=torch.float64, device="cpu")
    with pytest.raises(ValueError, match="pass backend=None"):
        linear_argmax(x, x, backend="triton")
    assert torch.equal(linear_argmax(x, x), (x @ x.t()).argmax(dim=1))


@backends
def test_a_weight_that_was_split_before_gives_the_same_ids(backend):
    x, weight, bias = torch.randn(30, 16).half(), torch.randn(50, 16), torch.randn(50)
    half, rest = split_fp16(weight)
    options = {"precision": "fp16x2", "backend": backend}
    want = linear_argmax(x, weight, bias, **options)
    assert torch.equal(linear_argmax(x, half, bias, rest=rest, **options), want)
    torch.library.opcheck(
        torch.ops.beit_fast.linear_argmax.default,
        (x, half, bias, None, "fp16x2", backend, rest),
    )


def test_shapes_and_names_that_do_not_fit_are_refused():
    x, weight = torch.randn(4, 16), torch.randn(50, 16)
    with pytest.raises(ValueError, match=r"weight \(V, D\)"):
        linear_argmax(x, weight.t())
    with pytest.raises(ValueError, match=r"pass \(50,\)"):
        linear_argmax(x, weight, torch.zeros(16))
    with pytest.raises(ValueError, match="int32 or int64"):
        linear_argmax(x, weight, None, torch.zeros(2))
    for weight_, rest, precision in (
        (weight, weight, "fp16x2"), (weight.half(), weight.half(), "fp16"),
        (weight.half(), weight.half()[1:], "fp16x2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="pass both as split_fp16 gives them"):
            linear_argmax(x, weight_, rest=rest, precision=precision)
    with pytest.raises(ValueError, match="one of fp32, tf32x3"):
        linear_argmax(x, weight, precision="fp8")
    with pytest.raises(ValueError, match="one of triton, torch"):
        linear_argmax(x, weight, backend="cpu")
