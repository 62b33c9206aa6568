import pytest
import torch
import torch.nn.functional as F

from beit_fast.kernels._triton import A100, H100, pretend
from beit_fast.kernels.conv import pixels as module
from beit_fast.kernels.conv.pixels import (
    conv_pixels,
    conv_pixels_backend,
    conv_pixels_reference,
)

# B, h, w, D, k: DALL-E's 7 x 7 with a tail of outputs and of pixels; an image smaller than the
# kernel; 3 x 3, whose 27 numbers fill one step.
SHAPES = [(2, 9, 10, 24, 7), (1, 2, 3, 8, 7), (1, 8, 8, 40, 3)]
shapes = pytest.mark.parametrize(
    "shape", SHAPES, ids=[f"B{B}-{h}x{w}-D{D}-k{k}" for B, h, w, D, k in SHAPES]
)


def inputs_of(shape, dtype=torch.uint8):
    B, h, w, D, k = shape
    pixels = torch.randint(0, 256, (B, h, w, 3), dtype=torch.uint8)
    pixels = pixels if dtype == torch.uint8 else (pixels / 255).to(dtype)
    return pixels, torch.randn(D, k, k, 3) / (255 * k), torch.randn(D)


@shapes
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pixel_dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("gpu", [A100, H100], ids=["sm_80", "sm_90"])
def test_the_kernel_is_as_exact_as_the_reference(shape, weight_dtype, pixel_dtype, gpu):
    pixels, weight, bias = inputs_of(shape, pixel_dtype)
    weight = weight.to(weight_dtype)
    options = {"scale": 1.0 if pixel_dtype == torch.uint8 else 255.0, "fill": -31.875}
    exact = conv_pixels_reference(pixels, weight.double(), bias.double(), **options)
    theirs = conv_pixels_reference(pixels, weight, bias, **options)
    with pretend(gpu):
        out = conv_pixels(pixels, weight, bias, **options, backend="triton")
    rounding = torch.finfo(weight_dtype).eps * exact.abs().max()
    assert out.dtype == weight_dtype
    assert out.shape == exact.shape
    assert (out - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("pixel_dtype", [torch.uint8, torch.float32], ids=str)
def test_torch_computes_the_formula(dtype, pixel_dtype):
    pixels, weight, bias = inputs_of(SHAPES[0], pixel_dtype)
    weight = weight.to(dtype)
    options = {"scale": 1.0 if pixel_dtype == torch.uint8 else 255.0, "fill": -31.875}
    exact = conv_pixels_reference(pixels.double(), weight.double(), bias.double(), **options)
    theirs = conv_pixels_reference(pixels, weight, bias, **options)
    out = conv_pixels(pixels, weight, bias, **options, backend="torch")
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (out - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding


def test_a_map_of_the_pixels_folds_in_exactly_border_included():
    pixels, weight, bias = (t.double() for t in inputs_of(SHAPES[0]))
    a, e = 0.8 / 255, 0.1
    mapped = (a * pixels + e).permute(0, 3, 1, 2)
    want = F.conv2d(mapped, weight.permute(0, 3, 1, 2), bias, padding=3).permute(0, 2, 3, 1)
    out = conv_pixels(pixels.byte(), a * weight, bias + e * weight.sum(dim=(1, 2, 3)), fill=-e / a)
    torch.testing.assert_close(out, want, rtol=1e-13, atol=1e-13)
    for number in (*range(256), -31.875):  # what the operands are rounded to
        assert (
            torch.tensor(number).bfloat16().item() == torch.tensor(number).half().item() == number
        )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_pixels_may_lie_in_any_order_and_there_may_be_none(backend):
    pixels, weight, bias = inputs_of(SHAPES[0])
    weight = weight.half()
    want = conv_pixels(pixels, weight, bias, fill=-1.0, backend=backend)
    planes = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(conv_pixels(planes, weight, bias, fill=-1.0, backend=backend), want)
    assert conv_pixels(pixels[:0], weight, bias, backend=backend).shape == (0, 9, 10, 24)


def test_every_output_is_written(monkeypatch):
    pixels, weight, bias = inputs_of(SHAPES[0])
    launch = module.launch

    def launch_on_nan(*arguments, **options):
        options["out_ptr"].fill_(torch.nan)
        launch(*arguments, **options)

    monkeypatch.setattr(module, "launch", launch_on_nan)
    assert conv_pixels(pixels, weight.half(), bias, backend="triton").isfinite().all()


def test_the_operator_keeps_what_it_promises_the_compiler():
    pixels, weight, bias = inputs_of(SHAPES[1])
    for backend in ("triton", "torch"):
        torch.library.opcheck(
            torch.ops.beit_fast.conv_pixels.default,
            (pixels, weight.half(), bias, 1.0, -31.875, backend),
        )


def test_what_runs_can_be_asked_and_what_has_no_kernel_is_refused():
    pixels, weight, _ = inputs_of(SHAPES[0])
    assert conv_pixels_backend(pixels.cpu(), weight.cpu()) == "torch"
    assert conv_pixels_backend(pixels, weight.half(), "triton") == "triton"
    with pytest.raises(ValueError, match=r"not torch\.float32; pass backend=None"):
        conv_pixels_backend(pixels, weight, "triton")
    with pytest.raises(ValueError, match="multiples of 8, not 3"):
        conv_pixels_backend(pixels, weight[:3].half(), "triton")
    with pytest.raises(ValueError, match=r"'onednn'.*triton, torch"):
        conv_pixels_backend(pixels, weight, "onednn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.zeros(2, 3, 9, 10)}, r"\(2, 3, 9, 10\).*channels-last"),
        ({"pixels": torch.zeros(2, 9, 10, 3, dtype=torch.int32)}, "uint8 or floats"),
        ({"weight": torch.zeros(8, 4, 4, 3)}, "an odd k"),
        ({"bias": torch.zeros(7)}, r"a bias \(24,\)"),
    ],
    ids=["channels-first", "int32", "even", "bias"],
)
def test_what_does_not_fit_is_explained(change, message):
    names = ("pixels", "weight", "bias")
    inputs = dict(zip(names, inputs_of(SHAPES[0]), strict=True))
    with pytest.raises(ValueError, match=message):
        conv_pixels(**(inputs | change))
