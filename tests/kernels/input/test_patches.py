"""By hand: the kernels in Triton's interpreter; by default on a CPU: torch's own operators."""

import random
from types import SimpleNamespace

import pytest
import torch

from beit_fast.data.views.statistics import HALF_MEAN, HALF_STD, IMAGENET_MEAN, IMAGENET_STD
from beit_fast.data.views.two_views import normalize
from beit_fast.kernels import _triton
from beit_fast.kernels._triton import Gpu, pretend, record
from beit_fast.kernels.input import patches
from beit_fast.kernels.input.patches import normalized_patches, normalized_patches_reference
from beit_fast.model.patch_embed import patchify

BACKENDS = ("triton", "torch")


pytestmark = pytest.mark.usefixtures("new_memory_is_nan")


def random_images(B, height, width, C=3):
    return torch.randint(0, 256, (B, height, width, C), dtype=torch.uint8)


def statistics(C):
    return (0.485, 0.456, 0.406, 0.2, 0.9)[:C], (0.229, 0.224, 0.225, 0.7, 0.5)[:C]


def assert_same_bits(ours, theirs):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert torch.equal(ours, theirs)


# (B, height, width, C), patch: BEiT's; several programs of rows; one that is not full, with
# segments beyond the patch; two segments across; 1, 2 and 4 channels. Then by bytes: 14, 8 and odd.
SHAPES = [
    ((3, 48, 64, 3), (16, 16)),
    ((2, 12, 48, 3), (3, 16)),
    ((1, 32, 64, 1), (16, 32)),
    ((2, 8, 32, 2), (4, 16)),
    ((2, 4, 16, 4), (4, 16)),
    ((2, 28, 42, 3), (14, 14)),
    ((2, 16, 24, 3), (8, 8)),
    ((2, 4, 9, 5), (2, 3)),
    ((1, 2, 2, 1), (1, 1)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "patch"), SHAPES, ids=str)
def test_the_bits_are_those_of_the_reference(shape, patch, dtype, backend):
    images, (mean, std) = random_images(*shape), statistics(shape[3])
    B, L = shape[0], shape[1] // patch[0] * (shape[2] // patch[1])
    index = torch.randint(-1, B * L, (7,), dtype=torch.int32)
    for listed in (None, index):
        options = {"index": listed, "dtype": dtype}
        ours = normalized_patches(images, patch, mean, std, **options, backend=backend)
        assert_same_bits(ours, normalized_patches_reference(images, patch, mean, std, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), (HALF_MEAN, HALF_STD)], ids=["1k", "half"]
)
def test_the_bits_are_those_of_normalize_and_patchify_for_every_byte(mean, std, backend):
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    images = torch.cat((images, images.flip(1)), dim=2)
    for dtype in (torch.float32, torch.bfloat16):
        ours = normalized_patches(images, (16, 16), mean, std, dtype=dtype, backend=backend)
        assert_same_bits(ours, patchify(normalize(images, mean, std, dtype), (16, 16)))


def test_the_reference_is_the_textbook_formula_to_rounding():
    images, (mean, std) = random_images(2, 4, 6), statistics(3)
    ours = normalized_patches_reference(images, (2, 3), mean, std)
    exact = (images.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    exact = patchify(exact.permute(0, 3, 1, 2), (2, 3))
    assert (ours - exact).abs().max() < 5e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [16, 8])
def test_strides_change_nothing(side, backend):
    wide = random_images(5, 32, 80)
    views = {
        "every other image": wide[::2, :, :32],
        "one image for all": wide[:1, :, :32].expand(3, -1, -1, -1),
        "rows at 16 bytes": wide[:3, :, 16:48],
        "rows at odd bytes": wide[:3, :, 3:35],
        "planar": wide[:3, :, :32].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "transposed": wide[:3, :, :32].transpose(1, 2),
    }
    for name, images in views.items():
        ours = normalized_patches(images, (side, side), *statistics(3), backend=backend)
        expected = normalized_patches_reference(images, (side, side), *statistics(3))
        assert torch.equal(ours, expected), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend):
    rng = random.Random(0)
    for _ in range(20):
        patch = rng.choice((16, 3, 5, 8)), rng.choice((16, 16, 32, 4, 7))
        C = rng.randint(1, 5)
        shape = rng.randint(1, 3), patch[0] * rng.randint(1, 3), patch[1] * rng.randint(1, 3), C
        images, options = random_images(*shape), {"dtype": rng.choice(_triton.TRITON_DTYPES)}
        ours = normalized_patches(images, patch, *statistics(C), **options, backend=backend)
        theirs = normalized_patches_reference(images, patch, *statistics(C), **options)
        assert torch.equal(ours, theirs), (shape, patch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [16, 8])
def test_nothing_to_do_is_an_input(side, backend):
    options = {"mean": HALF_MEAN, "std": HALF_STD, "backend": backend}
    P = 3 * side * side
    none = torch.empty(0, dtype=torch.int32)
    assert normalized_patches(random_images(0, 32, 48), (side, side), **options).shape == (
        0, 32 * 48 // side**2, P,
    )  # fmt: skip
    assert normalized_patches(random_images(2, 0, 48), (side, side), **options).shape == (2, 0, P)
    ours = normalized_patches(random_images(2, 32, 48), (side, side), index=none, **options)
    assert ours.shape == (0, P)
    padding = torch.tensor([-1, -1])
    for B in (0, 2):
        ours = normalized_patches(random_images(B, 32, 48), (side, side), index=padding, **options)
        assert_same_bits(ours, torch.zeros(2, P))


@pytest.mark.parametrize("side", [16, 8])
def test_an_index_beyond_the_patches_is_nan_in_the_kernel_and_an_error_on_a_cpu(side):
    images, index = random_images(1, 32, 32), torch.tensor([0, -1, 16, -2], dtype=torch.int64)
    options = {"mean": HALF_MEAN, "std": HALF_STD, "index": index}
    ours = normalized_patches(images, (side, side), **options, backend="triton")
    assert [bool(row.isnan().all()) for row in ours] == [False, False, True, True]
    assert not ours[:2].isnan().any()
    if not torch.cuda.is_available():
        beyond = r"index\[0\] is {}, and the images have \d+ patches: pass 0 .*, or -1 for padding"
        for wrong in (16, -2):
            options["index"] = torch.tensor([wrong])
            with pytest.raises(ValueError, match=beyond.format(wrong)):
                normalized_patches(images, (side, side), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a file of holes stands for 2 GiB of images")
@pytest.mark.parametrize("side", [16, 8])
def test_images_lie_more_than_two_gigabytes_apart(side, tmp_path):
    stride = 2**31 + 64
    memory = torch.from_file(
        str(tmp_path / "holes"), shared=True, size=stride + 3072, dtype=torch.uint8
    )
    images = memory.as_strided((2, 32, 32, 3), (stride, 96, 3, 1))
    images.copy_(random_images(2, 32, 32))
    ours = normalized_patches(images, (side, side), HALF_MEAN, HALF_STD, backend="triton")
    compact = images.clone(memory_format=torch.contiguous_format)
    assert torch.equal(
        ours, normalized_patches_reference(compact, (side, side), HALF_MEAN, HALF_STD)
    )


@pytest.mark.parametrize(
    ("images", "side", "kernel"),
    [
        (lambda: random_images(2, 32, 32), 16, "_patches_kernel"),
        (lambda: random_images(2, 32, 64)[:, :, 16:48], 16, "_patches_kernel"),
        (lambda: random_images(2, 32, 32), 8, "_patches_bytes_kernel"),
        (lambda: random_images(2, 32, 32, 5), 16, "_patches_bytes_kernel"),
        (lambda: random_images(2, 32, 33)[:, :, 1:], 16, "_patches_bytes_kernel"),
    ],
    ids=["dense", "columns", "narrow", "five-channels", "odd-bytes"],
)
def test_sixteen_bytes_at_a_time_where_the_images_allow_it(images, side, kernel):
    images = images()
    with record() as launches:
        options = {"index": torch.tensor([1]), "backend": "triton"}
        normalized_patches(images, (side, side), *statistics(images.shape[3]), **options)
    assert [launch.kernel.fn.__name__ for launch in launches] == [kernel]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_decides_the_dtype(backend, device):
    images = random_images(1, 16, 16).to(device)
    options = {"patch_pixels": (16, 16), "mean": HALF_MEAN, "std": HALF_STD, "backend": backend}
    expected = normalized_patches(images, **options)
    assert expected.dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16):
        assert_same_bits(normalized_patches(images, **options), expected.bfloat16())
        ours = normalized_patches(images, **options, dtype=torch.float32)
    assert_same_bits(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_passes_opcheck_and_compiles_in_one_graph(backend, device):
    images = random_images(2, 16, 32).to(device)
    index = torch.tensor([1, -1, 3], dtype=torch.int32, device=device)
    operator = torch.ops.beit_fast.normalized_patches.default
    for listed in (None, index):
        arguments = (images, [16, 16], [*HALF_MEAN], [*HALF_STD], listed, torch.bfloat16, backend)
        torch.library.opcheck(operator, arguments)
    compiled = torch.compile(normalized_patches, fullgraph=True, backend="aot_eager")
    options = {"patch_pixels": (16, 16), "mean": HALF_MEAN, "std": HALF_STD, "backend": backend}
    ours = compiled(images, **options, index=index)
    assert_same_bits(ours, normalized_patches(images, **options, index=index))


def test_what_does_not_fit_is_refused_by_name():
    images, half = random_images(2, 32, 32), (HALF_MEAN, HALF_STD)
    with pytest.raises(ValueError, match=r"float32 \(2, 32, 32, 3\): pass uint8 \(B, height"):
        normalized_patches(images.float(), (16, 16), *half)
    with pytest.raises(ValueError, match="images of 32x32 pixels do not divide into patches of 1"):
        normalized_patches(images, (12, 16), *half)
    with pytest.raises(ValueError, match="pass 3 numbers each"):
        normalized_patches(images, (16, 16), (0.5,), (0.5,))
    with pytest.raises(ValueError, match="those of std above 0"):
        normalized_patches(images, (16, 16), HALF_MEAN, (0.5, 0.5, 0.0))
    with pytest.raises(ValueError, match=r"the index is torch.bool \(2, 4\): pass int32 or int64"):
        normalized_patches(images, (16, 16), *half, index=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="pass one of triton, torch, or None"):
        normalized_patches(images, (16, 16), *half, backend="cuda")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"num_patches": 2**31}, "fewer than 2147483648 patches, not 2147483648"),
        ({"capability": (7, 5)}, r"need compute capability 8.0, this GPU has \(7, 5\)"),
    ],
    ids=["fp64", "many-patches", "old-gpu"],
)
def test_a_fallback_on_cuda_says_why_once_and_a_wish_is_refused(fields, reason, monkeypatch):
    monkeypatch.setattr(_triton, "_warned", set())
    monkeypatch.setattr(_triton, "can_launch", lambda tensor: True)
    fields = {"dtype": torch.float32, "num_patches": 8, "capability": (9, 0)} | fields
    images = SimpleNamespace(device=torch.device("cuda"))
    arguments = images, fields["num_patches"], fields["dtype"]
    with pretend(Gpu(fields["capability"], 132, 1 << 20)):
        with pytest.warns(UserWarning, match=f"runs on torch, slower: .*{reason}"):
            assert patches._resolve("", *arguments) == "torch"
        assert patches._resolve("", *arguments) == "torch"  # a second is an error
        with pytest.raises(ValueError, match=f"cannot run here: .*{reason}"):
            patches._resolve("triton", *arguments)
