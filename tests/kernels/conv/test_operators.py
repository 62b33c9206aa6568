import itertools

import pytest
import torch

from beit_fast.kernels._triton import A100, B200, H100, RTX3090, RTX4090, RTX5090, pretend, record
from beit_fast.kernels.conv import operators as module
from beit_fast.kernels.conv.implicit_gemm import conv_triton, tile_of
from beit_fast.kernels.conv.operators import conv, conv_backend, conv_obstacle, conv_reference

HALF = [torch.float16, torch.bfloat16]

# B, h, w, C, D, k: edges within a tile, a tail of channels and of outputs; whole tiles, several
# outputs' tiles; more images than a tile takes; 5 x 5.
SHAPES = [
    (2, 6, 10, 24, 40, 3),
    (1, 16, 16, 64, 136, 1),
    (33, 2, 2, 16, 8, 3),
    (1, 4, 18, 72, 24, 5),
]
shapes = pytest.mark.parametrize(
    "shape", SHAPES, ids=[f"B{B}-{h}x{w}-C{C}-D{D}-k{k}" for B, h, w, C, D, k in SHAPES]
)
FORMS = {
    "plain": {},
    "relus": {"relu_input": True, "relu": True},
    "residual": {"residual": True},
    "residual-relu-pool": {"residual": True, "relu": True, "pool": True},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def inputs_of(shape, *, residual=False, **options):
    B, h, w, C, D, k = shape
    weight = torch.randn(D, k, k, C) / (k * k * C) ** 0.5
    added = torch.randn(B, h, w, D) if residual else None
    return [torch.randn(B, h, w, C), weight, torch.randn(D), added], options


def as_type(tensors, dtype, bias_dtype=None):
    x, weight, bias, residual = tensors
    bias = bias if bias_dtype is None else bias.to(bias_dtype)
    return [x.to(dtype), weight.to(dtype), bias, None if residual is None else residual.to(dtype)]


def assert_as_exact(out, tensors, options, dtype):
    """Twice the error of the reference in the same dtype, and one rounding."""
    x, weight, bias, residual = as_type(tensors, dtype)
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    exact = conv_reference(*wide, **options)
    theirs = conv_reference(x, weight, bias, residual, **options)
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert out.shape == exact.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert (out - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs start as NaN: what a kernel forgets to write is seen."""
    empty = module._empty_output
    monkeypatch.setattr(
        module, "_empty_output", lambda *arguments: empty(*arguments).fill_(torch.nan)
    )


@shapes
@forms
@pytest.mark.parametrize("gpu", [A100, H100], ids=["sm_80", "sm_90"])
def test_the_kernels_are_as_exact_as_the_reference(poisoned, shape, form, gpu):
    tensors, options = inputs_of(shape, **form)
    with pretend(gpu):
        out = conv(*as_type(tensors, torch.float16), **options, backend="triton")
    assert_as_exact(out, tensors, options, torch.float16)


@pytest.mark.parametrize("gpu", [A100, H100], ids=["sm_80", "sm_90"])
def test_the_kernels_take_bf16(poisoned, gpu):
    tensors, options = inputs_of(SHAPES[0], **FORMS["relus"], residual=True)
    with pretend(gpu):
        out = conv(*as_type(tensors, torch.bfloat16), **options, backend="triton")
    assert_as_exact(out, tensors, options, torch.bfloat16)


@forms
@pytest.mark.parametrize("backend", ["torch", "onednn", None])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_libraries_are_as_exact_as_the_reference(form, backend, dtype):
    tensors, options = inputs_of(SHAPES[0], **form)
    tensors = [None if t is None else t.cpu() for t in tensors]
    x, weight, *_ = as_type(tensors, dtype)
    if backend == "onednn" and conv_obstacle("onednn", x, weight):
        pytest.skip("oneDNN has no such convolution on this CPU")
    out = conv(*as_type(tensors, dtype), **options, backend=backend)
    assert_as_exact(out, tensors, options, dtype)


@forms
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN runs on GPUs")
def test_cudnn_is_as_exact_as_the_reference(form, dtype):
    tensors, options = inputs_of(SHAPES[0], **form)
    out = conv(*as_type(tensors, dtype), **options, backend="cudnn")
    assert_as_exact(out, tensors, options, dtype)


@pytest.mark.parametrize("backend", ["triton", "torch", None])
@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])
def test_the_residual_is_kept_unless_it_may_be_overwritten(backend, pool):
    dtype = torch.float16 if backend == "triton" else torch.float32
    tensors, _ = inputs_of(SHAPES[0], residual=True)
    x, weight, bias, residual = as_type(tensors, dtype)
    before = residual.clone()
    want = conv(x, weight, bias, residual, pool=pool, backend=backend)
    assert torch.equal(residual, before)
    out = conv(x, weight, bias, residual, pool=pool, overwrite=True, backend=backend)
    assert torch.equal(out, want)
    assert (out.data_ptr() == residual.data_ptr()) == (not pool)


def test_an_overwritten_residual_of_other_strides_is_left_alone():
    tensors, _ = inputs_of(SHAPES[0])
    residual = torch.randn(2, 40, 6, 10).permute(0, 2, 3, 1)
    out = conv(*tensors[:3], residual, overwrite=True)
    torch.testing.assert_close(out, conv_reference(*tensors[:3], residual))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_inputs_need_not_be_contiguous(backend):
    tensors, _ = inputs_of(SHAPES[0], residual=True)
    x, weight, bias, residual = as_type(tensors, torch.float16)
    want = conv(x, weight, bias, residual, backend=backend)
    strided = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (x, weight)]
    apart = residual.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(conv(*strided, bias, apart, backend=backend), want)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nan_goes_through_relu_and_pooling(backend):
    (x, weight, bias, _), _ = inputs_of(SHAPES[1])
    x, weight = x.half(), weight.half()
    x[0, 5, 7, 3] = torch.nan
    out = conv(x, weight, bias, relu_input=True, relu=True, pool=True, backend=backend)
    assert out[0, 2, 3].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])
def test_no_images_give_no_features(backend, pool):
    x, weight = torch.zeros(0, 4, 6, 16).half(), torch.zeros(24, 3, 3, 16).half()
    out = conv(x, weight, torch.zeros(24), pool=pool, backend=backend)
    assert out.shape == ((0, 2, 3, 24) if pool else (0, 4, 6, 24))


def test_tiles_leave_no_pixel_out_and_few_beyond_the_edges():
    for side in (112, 56, 28, 14):
        NB, TH, TW = tile_of(256, side, side)
        assert NB * TH * TW == 128
        assert side % TH == side % TW == 256 % NB == 0  # DALL-E's grids: no waste
    assert tile_of(256, 112, 112) == (1, 8, 16)
    assert tile_of(1, 14, 14)[0] == 1


@pytest.mark.parametrize("gpu", [A100, RTX3090, RTX4090, H100, B200, RTX5090], ids=str)
def test_the_stages_of_every_tile_fit_the_shared_memory_of_the_gpu(gpu):
    for C, D, side in itertools.product((8, 64, 1024), (8, 64, 128, 256, 2048), (1, 3)):
        x, weight, bias, out = (
            torch.empty(shape, dtype=torch.float16, device="meta")
            for shape in ((2, 8, 8, C), (D, side, side, C), (D,), (2, 8, 8, D))
        )
        with pretend(gpu), record() as launches:
            conv_triton(x, weight, bias, None, False, False, out)
        tile = launches[0].arguments
        stage = 2 * tile["BLOCK_C"] * (128 + tile["BLOCK_D"])
        assert launches[0].options["num_stages"] * stage <= gpu.shared_bytes


def test_indices_reach_beyond_two_to_the_31():
    # 4.5 G elements: addresses must be 64 bits wide. What runs on a GPU is looked at by the byte.
    if not torch.cuda.is_available():
        with pretend(H100), record() as launches:
            x = torch.empty(1400, 112, 112, 256, dtype=torch.float16, device="meta")
            out = torch.empty_like(x)
            weight = torch.empty(256, 1, 1, 256, dtype=torch.float16, device="meta")
            conv_triton(x, weight, torch.empty(256, device="meta"), None, False, False, out)
        assert launches[0].grid == (1400 * 98 * 2,)
        assert launches[0].arguments["x_desc"].shape == list(x.shape)
        return
    x = torch.zeros(1400, 112, 112, 256, dtype=torch.float16)
    x[-1] = 1
    weight = torch.eye(256).half().view(256, 1, 1, 256)
    out = conv(x, weight, torch.zeros(256), backend="triton")
    assert torch.equal(out[-1], x[-1])


def test_the_operators_keep_what_they_promise_the_compiler():
    tensors, _ = inputs_of((1, 4, 4, 8, 8, 3), residual=True)
    x, weight, bias, residual = as_type(tensors, torch.float16)
    for backend in ("triton", "torch"):
        torch.library.opcheck(
            torch.ops.beit_fast.conv.default,
            (x, weight, bias, residual, True, True, True, backend),
        )
        torch.library.opcheck(
            torch.ops.beit_fast.conv_add_.default,
            (x, weight, bias, residual.clone(), True, False, backend),
        )


@pytest.mark.parametrize("overwrite", [False, True])
def test_compiles_in_one_graph(overwrite):
    tensors, _ = inputs_of(SHAPES[0], residual=True)
    x, weight, bias, residual = tensors

    def chain(x, residual):
        return conv(x * 2, weight, bias, residual + 1, overwrite=overwrite).sum(dim=0)

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual), chain(x, residual))


def test_what_runs_can_be_asked_and_a_fallback_is_said_once(monkeypatch):
    x, weight = torch.zeros(1, 2, 2, 8), torch.zeros(8, 3, 3, 8)
    on_cpu = x.cpu(), weight.cpu()
    assert conv_backend(*on_cpu) in ("onednn", "torch")
    assert conv_backend(*on_cpu, "torch") == "torch"
    assert conv_backend(x.half(), weight.half(), "triton") == "triton"
    assert conv_backend(x.cpu().double(), weight.cpu().double()) == "torch"  # without a warning
    monkeypatch.setattr("beit_fast.kernels._triton._warned", set())
    monkeypatch.setattr(module, "_HAS_ONEDNN", False)
    with pytest.warns(UserWarning, match=r"conv runs on torch, slower than onednn: .*no oneDNN"):
        assert conv_backend(*on_cpu) == "torch"
    assert conv_backend(*on_cpu) == "torch"  # once


def test_what_has_no_kernel_is_refused_by_name():
    x, weight = torch.zeros(1, 2, 2, 12).half(), torch.zeros(8, 3, 3, 12).half()
    with pytest.raises(ValueError, match=r"multiples of 8, not 12 to 8; pass backend=None"):
        conv_backend(x, weight, "triton")
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        conv_backend(x.float(), weight.float(), "triton")
    with pytest.raises(ValueError, match=r"cuDNN takes no cpu tensors"):
        conv_backend(x.cpu(), weight.cpu(), "cudnn")
    with pytest.raises(ValueError, match=r"'cuda'.*triton, cudnn, onednn, torch"):
        conv_backend(x, weight, "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 6, 10)}, r"x is \(2, 8, 6, 10\).*channels-last"),
        ({"weight": torch.zeros(8, 2, 2, 8)}, "odd k"),
        ({"bias": torch.zeros(3)}, r"bias is \(3,\): pass \(8,\)"),
        ({"residual": torch.zeros(2, 6, 10, 4)}, r"residual is .*pass \(2, 6, 9, 8\)"),
        ({"weight": torch.zeros(8, 3, 3, 8).half()}, "float16, torch.float32"),
        ({"pool": True}, "6 x 9: pooling by 2 x 2 needs even sides"),
    ],
    ids=["channels-first", "even", "bias", "residual", "dtypes", "odd"],
)
def test_what_does_not_fit_is_explained(change, message):
    x, weight, bias = torch.zeros(2, 6, 9, 8), torch.zeros(8, 3, 3, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=message):
        conv(**{"x": x, "weight": weight, "bias": bias, **change})
