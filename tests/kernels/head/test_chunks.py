"""What the loss costs: products, memory, and the rows of logits at a time."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.kernels._triton import A100, B200, H100, Gpu, pretend, record
from beit_fast.kernels.head import chunks, linear_cross_entropy
from beit_fast.kernels.head.chunks import default_chunk_rows
from beit_fast.kernels.head.linear_cross_entropy import masked_linear_cross_entropy
from masked_head import B, D, N, V, backends, head

pytestmark = pytest.mark.usefixtures("nan_where_memory_is_fresh")

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
