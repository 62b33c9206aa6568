import functools

import pytest
import torch

from beit_fast.kernels.head.gather_rows import gather_rows, gather_rows_reference

B, N, D = 3, 10, 16

INDICES = {
    "padded": [3, 29, 7, 12, -1, -1],
    "padding-between": [-1, 3, -1, 29, -1],
    "duplicates": [5, 8, 5, 5, 8],
    "every-row": list(range(B * N)),
    "none-real": [-1, -1],
    "empty": [],
}
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
indices = pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)


def as_index(index, dtype=torch.int32):
    return torch.tensor(index, dtype=dtype)


@pytest.fixture(autouse=True)
def _nan_where_memory_is_fresh(monkeypatch):
    """What nobody writes shows: `new_empty` hands out NaN."""
    plain = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        tensor = plain(*args, **kwargs)
        if tensor.device.type == "meta" or torch._is_functional_tensor(tensor):
            return tensor
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16],
                         ids=["fp32", "bf16", "fp16"])  # fmt: skip
@indices
def test_as_exact_as_the_reference(assert_as_exact_as_reference, backend, dtype, index):
    ours = functools.partial(gather_rows, index=as_index(index), backend=backend)
    theirs = functools.partial(gather_rows_reference, index=as_index(index))
    assert_as_exact_as_reference(ours, theirs, [torch.randn(B, N, D)], dtype)


@backends
@pytest.mark.parametrize("D", [1, 5, 64, 1300])
def test_rows_of_any_width_arrive_as_they_are(backend, D):
    x = torch.randn(B, N, D, requires_grad=True)
    index = as_index([28, 3, -1, 3], torch.int64)
    out = gather_rows(x, index, backend=backend)
    expected = torch.stack((x[2, 8], x[0, 3], torch.zeros(D), x[0, 3]))
    assert torch.equal(out, expected)
    (dx,) = torch.autograd.grad(out.sum(), x)
    times = torch.zeros(B, N)
    times[2, 8], times[0, 3] = 1, 2
    assert torch.equal(dx, times[:, :, None].expand(B, N, D))


@backends
def test_strided_inputs_are_read_where_they_are(backend):
    wide = torch.randn(N, B, 2 * D)
    index = as_index([3, 29, -1, 12])
    for x in (wide[..., :D].transpose(0, 1), wide[..., ::2].transpose(0, 1)):
        x = x.detach().requires_grad_()
        out = gather_rows(x, index, backend=backend)
        assert torch.equal(out, gather_rows_reference(x, index))
        dout = torch.randn(D, len(index)).t()
        (dx,) = torch.autograd.grad(out, x, dout)
        expected = torch.zeros(B * N, D).index_add(
            0, index.clamp(min=0), dout * (index >= 0)[:, None]
        )
        assert torch.equal(dx.flatten(0, 1), expected)


@backends
def test_rows_that_are_not_listed_are_not_read(backend):
    x = torch.full((B, N, D), torch.nan)
    x[1, 2] = 1.0
    out = gather_rows(x, as_index([-1, 12]), backend=backend)
    assert torch.equal(out, torch.tensor([0.0, 1.0])[:, None].expand(2, D))


@backends
def test_an_empty_batch_has_no_rows(backend):
    x = torch.zeros(0, N, D, requires_grad=True)
    out = gather_rows(x, as_index([-1, -1]), backend=backend)
    assert torch.equal(out, torch.zeros(2, D))
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("row", [B * N, 2**31 - 1, -2])
def test_what_is_out_of_range_is_refused_on_a_cpu_and_nan_on_a_device(row):
    x, index = torch.randn(B, N, D), as_index([3, row])
    with pytest.raises(
        ValueError, match=rf"index\[1\] is {row}, and x has 30 rows: pass 0 \.\. 29"
    ):
        gather_rows(x.cpu(), index.cpu())
    x.requires_grad_()
    out = gather_rows(x, index, backend="triton")
    assert torch.equal(out[0], x[0, 3])
    assert out[1].isnan().all()
    (dx,) = torch.autograd.grad(out[0].sum() + out[1].nansum(), x)
    assert dx.sum() == D


def test_needs_no_value_on_the_host():
    # The meta device has shapes and no values.
    x = torch.randn(B, N, D, device="meta", requires_grad=True)
    out = gather_rows(x, torch.empty(7, dtype=torch.int32, device="meta"))
    out.sum().backward()
    assert (out.shape, x.grad.shape) == ((7, D), x.shape)


@backends
def test_the_operators_keep_what_they_promise_the_compiler(backend, monkeypatch):
    monkeypatch.undo()  # opcheck compares outputs, NaN in what is nobody's does not compare
    x, index = torch.randn(B, N, D, requires_grad=True), as_index([3, 29, -1])
    torch.library.opcheck(torch.ops.beit_fast.gather_rows.default, (x, index, backend))
    arguments = (torch.randn(3, D), index, (B, N, D), backend)
    torch.library.opcheck(torch.ops.beit_fast.gather_rows_backward.default, arguments)


def test_compiles_in_one_graph():
    x, index = torch.randn(B, N, D, requires_grad=True), as_index([3, 29, -1])
    compiled = torch.compile(gather_rows, fullgraph=True, backend="aot_eager")
    out = compiled(x, index)
    assert torch.equal(out, gather_rows(x, index))
    (dx,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(gather_rows(x, index).square().sum(), x)
    assert torch.equal(dx, expected)


def test_what_does_not_fit_is_refused_by_name():
    x, index = torch.randn(B, N, D), as_index([0])
    with pytest.raises(ValueError, match=r"x is \(10, 16\): pass \(B, N, D\)"):
        gather_rows(x[0], index)
    with pytest.raises(ValueError, match=r"the index is torch.float32 \(1,\): pass int32 or int64"):
        gather_rows(x, index.float())
    with pytest.raises(ValueError, match="backend is 'cuda': pass one of triton, torch, or None"):
        gather_rows(x, index, backend="cuda")
    with pytest.raises(
        ValueError, match=r"cannot run here: the kernels take bfloat16, .* not torch"
    ):
        gather_rows(x.double(), index, backend="triton")
    with pytest.raises(ValueError, match="take up to 8192 channels, not 8193"):
        gather_rows(torch.zeros(1, 1, 8193), index, backend="triton")
