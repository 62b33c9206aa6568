import functools
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.kernels._triton import A100, B200, H100, Gpu, pretend, record
from beit_fast.kernels.head import chunks, linear_cross_entropy
from beit_fast.kernels.head.chunks import default_chunk_rows
from beit_fast.kernels.head.linear_cross_entropy import (
    masked_linear_cross_entropy,
    masked_linear_cross_entropy_reference,
)

B, N, D, V = 3, 10, 16, 50

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def head(V=V, D=D):
    """weight, bias, norm_weight, norm_bias."""
    return torch.randn(V, D) / D**0.5, torch.randn(V), torch.randn(D), torch.randn(D)


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with torch.device(device):
        yield


@pytest.fixture(autouse=True)
def _nan_where_memory_is_fresh(monkeypatch):
    """What nobody writes shows: `new_empty` and `torch.empty` hand out NaN."""
    plain_new, plain_empty = torch.Tensor.new_empty, torch.empty

    def poisoned(tensor):
        if tensor.device.type == "meta" or torch._is_functional_tensor(tensor):
            return tensor
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: poisoned(plain_new(self, *a, **k))
    )
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(plain_empty(*a, **k)))


INDICES = {
    "padded": [3, 29, 7, 12, -1, -1],
    "ascending": [3, 7, 7, 12, 29, -1],
    "padding-between": [-1, 3, -1, 29, -1],
    "duplicates": [5, 8, 5, 5, 8],
    "one": [0],
    "every-row": list(range(B * N)),
    "none-real": [-1, -1],
    "empty": [],
}


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_as_exact_as_the_reference(assert_as_exact_as_reference, backend, index, dtype):
    index = torch.tensor(index, dtype=torch.int32)
    target = torch.randint(V, index.shape)

    def run(function, **options):
        return lambda x, *weights: function(x, index, target, *weights, **options)

    assert_as_exact_as_reference(
        run(masked_linear_cross_entropy, backend=backend, chunk_rows=4),
        run(masked_linear_cross_entropy_reference),
        [torch.randn(B, N, D), *head()],
        dtype,
    )


OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.05},
    "both": {"label_smoothing": 0.1, "z_loss": 0.05, "reduction": "sum"},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "none-smoothing": {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01},
    "eps": {"norm_eps": 1},
}


@backends
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_mean_what_they_mean_to_the_reference(
    assert_as_exact_as_reference, backend, options
):
    index = torch.tensor([3, 29, -1, 3])
    target = torch.randint(V, (4,))

    def run(function, **more):
        return lambda x, *weights: function(x, index, target, *weights, **options, **more)

    assert_as_exact_as_reference(
        run(masked_linear_cross_entropy, backend=backend, chunk_rows=2),
        run(masked_linear_cross_entropy_reference),
        [torch.randn(B, N, D), *head()],
        torch.float32,
    )
    inputs = (torch.randn(B, N, D), index, target, *head())
    plain, _ = masked_linear_cross_entropy(*inputs, backend=backend)
    other, _ = masked_linear_cross_entropy(*inputs, **options, backend=backend)
    assert plain.shape != other.shape or plain != other


# V: below, at and above a tile, odd, more than one tile of 8192. D: below a load, with a tail, a
# warp's, two warps' and a whole CTA's row.
SHAPES = [(7, 8), (128, 24), (129, 40), (1000, 264), (8200, 16), (21, 768), (16, 1032), (70, 8192)]


@pytest.mark.parametrize(("V", "D"), SHAPES, ids=[f"V{V}-D{D}" for V, D in SHAPES])
def test_kernels_take_any_number_of_classes_and_channels(assert_as_exact_as_reference, V, D):
    index = torch.tensor([3, 29, -1, 7, 3, 12], dtype=torch.int32)
    target = torch.randint(V, index.shape)

    def run(function, **options):
        options["label_smoothing"] = 0.1
        return lambda x, *weights: function(x, index, target, *weights, **options)

    tensors = [torch.randn(B, N, D), *head(V, D)]
    assert_as_exact_as_reference(
        run(masked_linear_cross_entropy, backend="triton", chunk_rows=4),
        run(masked_linear_cross_entropy_reference),
        tensors,
        torch.float32,
    )


@pytest.mark.parametrize("seed", range(12))
def test_any_inputs_agree_with_the_reference(assert_as_exact_as_reference, seed):
    torch.manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), device="cpu"))

    B, N, D, V = draw(1, 4), draw(1, 12), 8 * draw(1, 40), draw(2, 300)
    index = torch.randint(-1, B * N, (draw(1, 40),))
    target = torch.randint(V, index.shape)
    vectors = head(V, D)[1:]
    present = [bool(draw(0, 3)) for _ in range(3)]
    present[2] &= present[1]
    tensors = [torch.randn(B, N, D), torch.randn(V, D) / D**0.5]
    tensors += [v if there else None for v, there in zip(vectors, present, strict=True)]
    options = {
        "reduction": ("mean", "sum", "none")[draw(0, 2)],
        "label_smoothing": draw(0, 1) / 10,
        "z_loss": draw(0, 1) / 100,
    }

    def run(function, **more):
        return lambda x, *weights: function(x, index, target, *weights, **options, **more)

    assert_as_exact_as_reference(
        run(masked_linear_cross_entropy, backend="triton", chunk_rows=draw(1, 41)),
        run(masked_linear_cross_entropy_reference),
        tensors,
        (torch.float32, torch.bfloat16)[draw(0, 1)],
    )


@backends
def test_without_a_norm_the_rows_enter_the_product_as_they_are(backend):
    x, weight = torch.randn(B, N, D, requires_grad=True), torch.randn(V, D)
    index, target = torch.tensor([13]), torch.tensor([4])
    loss, _ = masked_linear_cross_entropy(x, index, target, weight, backend=backend)
    torch.testing.assert_close(loss, -(weight @ x[1, 3]).log_softmax(0)[4])
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.flatten(0, 1).any(dim=1).nonzero().flatten().tolist() == [13]


@backends
def test_equal_logits_cost_ln_v(backend):
    loss, _ = masked_linear_cross_entropy(
        torch.randn(B, N, D), torch.tensor([1, 2, -1]), torch.tensor([7, 8, 9]), torch.zeros(V, D),
        backend=backend,
    )  # fmt: skip
    assert loss.item() == pytest.approx(math.log(V))


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("index", [[-1, -1], []], ids=["all-padding", "empty"])
def test_without_a_real_row_loss_and_gradients_are_zero(backend, index, reduction):
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    index = torch.tensor(index, dtype=torch.int32)
    loss, num_correct = masked_linear_cross_entropy(
        leaves[0], index, torch.zeros(len(index), dtype=torch.int64), *leaves[1:],
        reduction=reduction, backend=backend,
    )  # fmt: skip
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros_like(loss))
    assert num_correct.item() == 0
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@backends
@pytest.mark.parametrize("index", [[-1, -1], []], ids=["all-padding", "empty"])
def test_an_empty_batch_costs_nothing(backend, index):
    leaves = [t.requires_grad_() for t in (torch.randn(0, N, D), *head())]
    index = torch.tensor(index, dtype=torch.int32)
    loss, _ = masked_linear_cross_entropy(leaves[0], index, index, *leaves[1:], backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@backends
def test_padding_changes_neither_loss_nor_gradients_whatever_its_target(backend):
    x, (weight, bias, *norm) = torch.randn(B, N, D, requires_grad=True), head()
    weight.requires_grad_()
    index, target = torch.tensor([4, 11]), torch.tensor([1, 2])
    padded_index = torch.tensor([4, -1, 11, -1, -1])
    padded_target = torch.tensor([1, V + 3, 2, -7, 0])
    results = []
    for i, t in ((index, target), (padded_index, padded_target)):
        loss, num_correct = masked_linear_cross_entropy(
            x, i, t, weight, bias, *norm, backend=backend
        )
        results.append((loss, *torch.autograd.grad(loss, (x, weight)), num_correct))
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(plain, padded)


@backends
def test_only_listed_rows_are_read_and_get_a_gradient(backend):
    x = torch.full((B, N, D), torch.nan)
    x.view(-1, D)[[4, 25]] = torch.randn(2, D)
    x.requires_grad_()
    index = torch.tensor([4, 25, -1], dtype=torch.int32)
    loss, _ = masked_linear_cross_entropy(
        x, index, torch.tensor([1, 2, 3]), *head(), backend=backend
    )
    loss.backward()
    assert x.grad.flatten(0, 1).any(dim=1).nonzero().flatten().tolist() == [4, 25]


@backends
def test_counts_the_rows_whose_largest_logit_is_the_target(backend):
    weight = 10 * torch.eye(V, D)
    x = torch.zeros(1, 4, D)
    x[0, torch.arange(4), torch.tensor([3, 5, 7, 9])] = 1
    index, target = torch.tensor([0, 1, 2, -1]), torch.tensor([3, 5, 8, 9])
    _, num_correct = masked_linear_cross_entropy(x, index, target, weight, backend=backend)
    assert num_correct.item() == 2
    assert num_correct.dtype == torch.int64


@backends
@pytest.mark.parametrize("V", [50, 9000])
def test_among_equal_logits_the_lowest_is_the_prediction(backend, V):
    weight = torch.zeros(V, D)
    weight[[5, 6, V - 1], 0] = 1
    x, index = torch.ones(1, 3, D), torch.arange(3)
    target = torch.tensor([5, 6, V - 1])
    _, num_correct = masked_linear_cross_entropy(x, index, target, weight, backend=backend)
    assert num_correct.item() == 1


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_are_multiplied_with_the_losss(backend, reduction):
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    index, target = torch.tensor([4, 25, 4, -1]), torch.tensor([1, 2, 3, 4])
    loss, _ = masked_linear_cross_entropy(
        leaves[0], index, target, *leaves[1:], reduction=reduction, backend=backend
    )
    theirs, _ = masked_linear_cross_entropy_reference(
        leaves[0], index, target, *leaves[1:], reduction=reduction
    )
    dloss = torch.randn(theirs.shape)
    for _ in range(2):  # a graph that is kept gives the same again
        ours = torch.autograd.grad(loss, leaves, dloss, retain_graph=True)
    for our, their in zip(ours, torch.autograd.grad(theirs, leaves, dloss), strict=True):
        torch.testing.assert_close(our, their)


@backends
def test_gradients_of_two_batches_add_up(backend):
    weights = [t.requires_grad_() for t in head()]
    index, target = torch.tensor([4, 25]), torch.tensor([1, 2])
    total = [torch.zeros_like(w) for w in weights]
    for _ in range(2):
        loss, _ = masked_linear_cross_entropy(
            torch.randn(B, N, D), index, target, *weights, backend=backend
        )
        for sum_, gradient in zip(total, torch.autograd.grad(loss, weights, retain_graph=True),
                                  strict=True):  # fmt: skip
            sum_ += gradient
        loss.backward()
    for weight, sum_ in zip(weights, total, strict=True):
        torch.testing.assert_close(weight.grad, sum_)


@backends
@pytest.mark.parametrize(
    "wanted", range(5), ids=["x", "weight", "bias", "norm_weight", "norm_bias"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_can_be_had_alone(backend, wanted, reduction):
    tensors = [torch.randn(B, N, D), *head()]
    index, target = torch.tensor([4, 25, 4, -1]), torch.tensor([1, 2, 3, 4])

    def gradients(leaves):
        loss, _ = masked_linear_cross_entropy(
            tensors[0], index, target, *tensors[1:], reduction=reduction, backend=backend
        )
        return torch.autograd.grad(loss.sum(), leaves)

    tensors[wanted].requires_grad_()
    (alone,) = gradients([tensors[wanted]])
    for tensor in tensors:
        tensor.requires_grad_()
    assert torch.equal(alone, gradients(tensors)[wanted])


_PRODUCTS = ("mm", "addmm", "linear", "_linear_pointwise")
_INSIDE = {
    "masked_linear_cross_entropy": linear_cross_entropy._forward,
    "masked_linear_cross_entropy_backward": linear_cross_entropy._backward,
}


class _Products(TorchDispatchMode):
    """Counts matrix products, and the bytes of tensors that are alive."""

    def __init__(self):
        super().__init__()
        self.num_products, self.bytes, self.peak = 0, 0, 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num_products += function.overloadpacket.__name__ in _PRODUCTS
        inside = _INSIDE.get(function.overloadpacket.__name__)
        if inside is None:
            out = function(*args, **(kwargs or {}))
        else:  # torch shows a mode the operator, and not what it does
            with self:
                out = inside(*args)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage):
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key):
        self.bytes -= self.alive.pop(key)


NEEDS = {
    "none": ([], 1),
    "x": ([0], 2),
    "weight": ([1], 2),
    "norm": ([3, 4], 2),
    "all": (range(5), 3),
}


@backends
@pytest.mark.parametrize(("wanted", "products"), NEEDS.values(), ids=NEEDS)
def test_what_needs_no_gradient_costs_no_product(backend, wanted, products):
    tensors = [torch.randn(B, N, D), *head()]
    for number in wanted:
        tensors[number].requires_grad_()
    index, target = torch.tensor([4, 25]), torch.tensor([1, 2])
    with _Products() as forward:
        loss, _ = masked_linear_cross_entropy(
            tensors[0], index, target, *tensors[1:], backend=backend
        )
    with torch.no_grad(), _Products() as evaluation:
        masked_linear_cross_entropy(tensors[0], index, target, *tensors[1:], backend=backend)
    assert forward.num_products == products
    assert evaluation.num_products == 1
    if wanted:
        with _Products() as backward:
            loss.backward()
        assert backward.num_products == 0


@backends
def test_memory_grows_with_the_chunk_and_not_with_the_rows_times_the_classes(backend):
    """Beyond inputs, gradients and what is as large as the listed rows or as the weight."""
    V, D, chunk_rows = 1024, 8, 16
    peaks = []
    for num_rows in (64, 128):
        x, index = torch.randn(1, num_rows, D, requires_grad=True), torch.arange(num_rows)
        weight = torch.randn(V, D, requires_grad=True)
        with _Products() as mode:
            masked_linear_cross_entropy(
                x, index, index, weight, chunk_rows=chunk_rows, backend=backend
            )
        peaks.append(mode.peak)
    logits = 4 * chunk_rows * V
    fixed = 2 * 4 * V * D + 20 * 4 * 128 * D
    assert logits < peaks[0] < 2 * logits + fixed
    assert peaks[1] - peaks[0] < 64 * 4 * V / 10  # a tenth of what the logits grew by


@pytest.mark.parametrize("gpu", [A100, H100, B200], ids=["sm80", "sm90", "sm100"])
def test_the_peak_is_at_most_60_megabytes_at_the_base_shape(gpu, monkeypatch):
    """What the operators allocate on a GPU beside the gradients they return, under autocast."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, device="meta", dtype=dtype)

    # In fp32 into the sum: on other devices than CUDA it takes copies.
    monkeypatch.setattr(chunks, "_add_product", lambda *_, **__: None)
    B, N, D, V = 256, 197, 768, 8192
    x, index = meta(B, N, D, dtype=torch.bfloat16), meta(B * 75, dtype=torch.int32)
    vectors = meta(V), meta(D), meta(D)
    inputs = (x, index, index, meta(V, D), *vectors)
    options = (1e-6, 0.0, 0.0, "mean", torch.bfloat16, 0, False, "triton")
    needs = [True] * 5
    returned = 4 * V * D + 4 * V  # dweight and dbias
    with pretend(gpu), record(), _Products() as forward:
        loss, _, *kept = linear_cross_entropy._forward(*inputs, *options, needs)
    assert 45e6 < forward.peak - returned <= 60e6
    again = (None, None, None)
    with pretend(gpu), record(), _Products() as backward:
        linear_cross_entropy._backward(
            loss,
            *kept,
            x,
            index,
            *again,
            *vectors[1:],
            *options,
            torch.float32,
            torch.float32,
            needs,
        )
    still_there = sum(t.untyped_storage().nbytes() for t in kept)
    assert 45e6 < still_there + backward.peak - returned - x.nbytes <= 60e6


def test_chunks_shrink_with_a_small_cache_and_leave_products_large_enough():
    small = Gpu((8, 6), 80, 6 << 20)
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    assert default_chunk_rows(8192, bf16, small, cuda) == 512
    assert default_chunk_rows(1024, bf16, small, cuda) == 1216
    assert default_chunk_rows(21841, bf16, H100, cuda) == 512
    assert default_chunk_rows(8192, torch.float32, H100, torch.device("cpu")) == 1024


def test_every_chunk_size_gives_the_same_loss():
    x, index, target, weights = (
        torch.randn(B, N, D),
        torch.arange(30),
        torch.randint(V, (30,)),
        head(),
    )
    losses = [
        masked_linear_cross_entropy(x, index, target, *weights, chunk_rows=rows, reduction="none")[
            0
        ]
        for rows in (1, 7, 30, 1000)
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


@backends
def test_the_same_input_gives_the_same_bits(backend):
    index = torch.tensor([4, 25, 4, -1, 7, 4, 25])
    target = torch.randint(V, index.shape)
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    runs = []
    for _ in range(2):
        loss, _ = masked_linear_cross_entropy(
            leaves[0], index, target, *leaves[1:], chunk_rows=3, backend=backend
        )
        runs.append((loss, *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_duplicates_add_up_in_any_order_of_the_index(order):
    rows = torch.tensor([2, 2, 2, 2, 9, 17, 17, 29] * 40)  # more than one program's rows
    rows = {
        "ascending": rows.sort().values,
        "descending": rows.sort(descending=True).values,
        "shuffled": rows[torch.randperm(len(rows))],
    }[order]
    index, target = torch.cat((rows, torch.tensor([-1]))), torch.randint(V, (len(rows) + 1,))
    x, weights = torch.randn(B, N, D, requires_grad=True), head()
    gradients = []
    for backend in ("triton", "torch"):
        loss, _ = masked_linear_cross_entropy(x, index, target, *weights, backend=backend)
        gradients.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*gradients)


@backends
@pytest.mark.parametrize("layout", ["no-cls", "transposed"])
def test_strided_inputs_are_read_where_they_are(backend, layout):
    x = (
        torch.randn(B, N + 1, D)[:, 1:]
        if layout == "no-cls"
        else torch.randn(N, D, B).permute(2, 0, 1)
    )
    index, target = torch.tensor([4, 25, 4]), torch.tensor([1, 2, 3])
    weights, results = head(), []
    for tensor in (x, x.contiguous()):
        leaf = tensor.detach().requires_grad_()
        loss, _ = masked_linear_cross_entropy(leaf, index, target, *weights, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_memory_after_x_is_never_read():
    storage = torch.full((B * N * D + 4096,), torch.nan)
    x = storage[: B * N * D].view(B, N, D).normal_()
    index = torch.tensor([B * N - 1, 0, -1])
    target = torch.tensor([V - 1, 0, V])
    loss, _ = masked_linear_cross_entropy(x, index, target, *head(), backend="triton")
    assert loss.isfinite()


WRONG = {
    "index-high": ([1, B * N], [0, 0], rf"index\[1\] is {B * N}, and x has {B * N} rows"),
    "index-low": ([1, -2], [0, 0], r"index\[1\] is -2"),
    "target-high": ([1, 2], [0, V], rf"target\[1\] is {V}, and the weight has {V} rows"),
    "target-low": ([1, 2], [-1, 0], r"target\[0\] is -1"),
}


@pytest.mark.parametrize(("index", "target", "message"), WRONG.values(), ids=WRONG)
def test_what_is_out_of_range_is_refused_on_a_cpu_and_on_request(index, target, message):
    inputs = (torch.randn(B, N, D), torch.tensor(index), torch.tensor(target), *head())
    with pytest.raises(ValueError, match=message):
        masked_linear_cross_entropy(*(t.cpu() for t in inputs))
    with pytest.raises(ValueError, match=message):
        masked_linear_cross_entropy(*inputs, backend="triton", check_values=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, interpreting
@pytest.mark.parametrize(("index", "target", "message"), WRONG.values(), ids=WRONG)
def test_what_is_out_of_range_makes_the_loss_nan_on_a_device(index, target, message):
    del message
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    index, target = torch.tensor(index), torch.tensor(target)
    for reduction in ("mean", "none"):
        loss, num_correct = masked_linear_cross_entropy(
            leaves[0], index, target, *leaves[1:], reduction=reduction, backend="triton"
        )
        assert loss.isnan().any()
        assert loss.isnan().sum() == 1  # of "none" the row alone
        assert num_correct <= 1
        assert torch.autograd.grad(loss.sum(), leaves[1])[0].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, interpreting
@backends
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_logits_that_are_not_finite_are_reported(backend, value):
    x, weights = torch.randn(B, N, D), head()
    x[0, 4, 2] = value
    index, target = torch.tensor([3, 4]), torch.tensor([1, 2])
    loss, num_correct = masked_linear_cross_entropy(
        x, index, target, *weights, reduction="none", backend=backend
    )
    assert loss.isfinite().tolist() == [True, False]
    assert num_correct <= 1


@backends
def test_a_class_that_is_ruled_out_costs_nothing(backend):
    bias = torch.zeros(V)
    bias[V - 9 :] = -torch.inf
    x, weight = torch.zeros(B, N, D, requires_grad=True), torch.randn(V, D)
    loss, _ = masked_linear_cross_entropy(
        x, torch.tensor([3]), torch.tensor([1]), weight, bias, backend=backend
    )
    assert loss.item() == pytest.approx(math.log(V - 9))
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_needs_no_value_on_the_host():
    # The meta device has shapes and no values: nonzero, boolean indexing and .item() raise there.
    def meta(*shape, **options):
        return torch.empty(*shape, device="meta", **options)

    loss, num_correct = masked_linear_cross_entropy(
        meta(B, N, D, requires_grad=True), meta(6, dtype=torch.int32),
        meta(6, dtype=torch.int64), meta(V, D, requires_grad=True), meta(V), meta(D), meta(D),
    )  # fmt: skip
    loss.backward()
    assert loss.shape == num_correct.shape == ()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_runs_on_a_gpu_needs_no_value_on_the_host(reduction):
    # The same, inside the operators: their launches are recorded instead of run.
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, device="meta", dtype=dtype)

    index = meta(40, dtype=torch.int32)
    inputs = (meta(B, N, D), index, index, meta(V, D), meta(V), meta(D), meta(D))
    options = (1e-6, 0.1, 0.1, reduction, torch.bfloat16, 16, False, "triton")
    needs = [True] * 5
    with record() as launches:
        loss, _, *kept = linear_cross_entropy._forward(*inputs, *options, needs)
        x, index, *others = inputs
        linear_cross_entropy._backward(
            loss, *kept, x, index, *others, *options, torch.bfloat16, torch.bfloat16, needs
        )
    names = {launch.kernel.fn.__name__ for launch in launches}
    assert len(names) == 5, names


@backends
def test_softmax_is_fp32_under_autocast(backend):
    x, index, target = torch.randn(B, N, D), torch.tensor([4, 25]), torch.tensor([1, 2])
    weights = head()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, _ = masked_linear_cross_entropy(x, index, target, *weights, backend=backend)
    assert loss.dtype == torch.float32
    expected, _ = masked_linear_cross_entropy(x, index, target, *weights)
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_under_autocast_the_error_is_that_of_the_eager_head(backend, dtype):
    """Of the loss at most the same, of gradients at most twice it, against fp64."""
    num_rows, V, D = 64, 500, 64
    x, index = torch.randn(1, num_rows, D), torch.arange(num_rows)
    tensors, target = [x, *head(V, D)], torch.randint(V, (num_rows,))

    def run(function, dtype, **options):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        loss, _ = function(leaves[0], index, target, *leaves[1:], **options)
        return loss.detach().double(), torch.autograd.grad(loss, leaves)

    exact_loss, exact = run(masked_linear_cross_entropy_reference, torch.float64)
    with torch.autocast(DEVICE, dtype):
        their_loss, theirs = run(masked_linear_cross_entropy_reference, torch.float32)
        our_loss, ours = run(
            masked_linear_cross_entropy, torch.float32, backend=backend, chunk_rows=24
        )
    rounding = torch.finfo(torch.float32).eps * exact_loss
    assert (our_loss - exact_loss).abs() <= (their_loss - exact_loss).abs() + 4 * rounding
    for our, their, want in zip(ours, theirs, exact, strict=True):
        assert (our - want).abs().max() <= 2 * (their - want).abs().max()


@backends
def test_half_precision_keeps_the_gradients_of_many_rows(backend):
    # Divided by the rows before it is rounded to fp16, 1 / 8192 would be off by 2 %.
    num_rows, V, D = 100, 8192, 8
    x, index = torch.ones(1, num_rows, D), torch.arange(num_rows)
    weight = torch.zeros(V, D, requires_grad=True)
    with torch.autocast(DEVICE, torch.float16):
        loss, _ = masked_linear_cross_entropy(x, index, index % 5, weight, backend=backend)
    (dweight,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(dweight[5:], torch.full((V - 5, D), 1 / V), rtol=1e-3, atol=0)


@backends
def test_compiles_in_one_graph(backend):
    function = functools.partial(masked_linear_cross_entropy, label_smoothing=0.1, backend=backend)
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    index, target = torch.tensor([4, -1]), torch.tensor([1, 0])

    def step(x, *weights):
        with torch.autocast(DEVICE, torch.bfloat16):
            return function(x * 1, index, target, *weights)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, step):
        loss, num_correct = run(*leaves)
        results.append((loss, num_correct, *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operators_keep_what_they_promise_the_compiler(backend, reduction, monkeypatch):
    monkeypatch.undo()  # opcheck compares memory that no one is to read
    leaves = [t.requires_grad_() for t in (torch.randn(B, N, D), *head())]
    index, target = torch.tensor([4, 25, -1]), torch.tensor([1, 2, 3])
    options = (1e-6, 0.1, 0.01, reduction, torch.float32, 2, False, backend)
    needs = [True] * 5
    inputs = (leaves[0], index, target, *leaves[1:])
    torch.library.opcheck(
        torch.ops.beit_fast.masked_linear_cross_entropy.default, (*inputs, *options, needs)
    )
    x, index, *others = (t.detach() for t in inputs)
    if reduction != "none":
        others[:3] = [None] * 3
    loss, _, *kept = (
        t.detach()
        for t in torch.ops.beit_fast.masked_linear_cross_entropy(*inputs, *options, needs)
    )
    torch.library.opcheck(
        torch.ops.beit_fast.masked_linear_cross_entropy_backward.default,
        (loss, *kept, x, index, *others, *options, torch.float32, torch.float32, needs),
    )


@backends
def test_counts_the_operations_of_its_products(backend):
    from torch.utils.flop_counter import FlopCounterMode

    x, (weight, *vectors) = torch.randn(B, N, D, requires_grad=True), head()
    index = torch.tensor([4, 25, -1])
    with FlopCounterMode(display=False) as counter:
        loss, _ = masked_linear_cross_entropy(x, index, index, weight, *vectors, backend=backend)
        loss.backward()
    assert counter.get_total_flops() == 2 * 2 * 3 * V * D


def test_what_has_no_kernel_is_refused_by_name():
    inputs = [torch.randn(B, N, D), torch.tensor([4]), torch.tensor([1]), *head()]
    inputs = [t.double() if t.is_floating_point() else t for t in inputs]
    with pytest.raises(ValueError, match="pass backend=None"):
        masked_linear_cross_entropy(*inputs, backend="triton")
    assert "8192 channels" in linear_cross_entropy.triton_obstacle(
        torch.zeros(1, 1, 8200), torch.float32
    )


@backends
def test_a_head_trains_as_with_the_reference(backend):
    """Twenty steps of SGD on all its parameters, and on what it reads."""
    start = [torch.randn(B, N, D), *head()]
    index = torch.tensor([1, 4, 13, 25, 28, -1])
    target = torch.randint(V, index.shape)
    histories = []
    for who in (backend, "reference"):
        leaves = [t.clone().requires_grad_() for t in start]
        optimizer = torch.optim.SGD(leaves, lr=0.3)
        losses = []
        for _ in range(20):
            loss, _ = masked_linear_cross_entropy(
                leaves[0], index, target, *leaves[1:], backend=who
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        histories.append(torch.stack(losses))
    assert histories[0][-1] < 0.7 * histories[0][0]
    torch.testing.assert_close(*histories)


def test_shapes_that_do_not_fit_are_refused_by_name():
    x, index, target = torch.randn(B, N, D), torch.tensor([4]), torch.tensor([1])
    weight = torch.randn(V, D)
    call = functools.partial(masked_linear_cross_entropy, x)
    with pytest.raises(ValueError, match="weight \\(V, D\\)"):
        call(index, target, weight.t())
    with pytest.raises(ValueError, match="int32 or int64"):
        call(index.bool(), target, weight)
    with pytest.raises(ValueError, match="integer for each row"):
        call(index, target[:0], weight)
    with pytest.raises(ValueError, match="integer for each row"):
        call(index, target.float(), weight)
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none'"):
        call(index, target, weight, reduction="max")
    with pytest.raises(ValueError, match="bias is \\(16,\\): pass \\(50,\\)"):
        call(index, target, weight, torch.zeros(D))
    with pytest.raises(ValueError, match="norm_bias came without"):
        call(index, target, weight, None, None, torch.zeros(D))
    with pytest.raises(ValueError, match="one of triton, torch, reference"):
        call(index, target, weight, backend="cpu")
    with pytest.raises(ValueError, match="chunk_rows is 0"):
        call(index, target, weight, chunk_rows=0)
