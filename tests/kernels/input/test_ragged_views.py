"""Pillow to the bit, from every layout; by hand the kernels in Triton's interpreter."""

import dataclasses
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.two_views import draw_view, reference_views
from beit_fast.kernels import _triton
from beit_fast.kernels._triton import Gpu, pretend, record
from beit_fast.kernels.input import ragged_views as operator
from beit_fast.kernels.input.ragged_views import MOST_SIDE, ragged_views
from beit_fast.kernels.input.ragged_views_reference import STEPS, VIEWS, ragged_views_reference
from beit_fast.kernels.input.ragged_views_triton import make_plan, make_weights, starts_of
from beit_fast.kernels.input.resampling import columns_first, resize_weights

BACKENDS = ("triton", "torch")
BRIGHTNESS, CONTRAST, SATURATION = 1, 2, 3

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")


def on_cpu(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device="cpu")


def batch(sizes, boxes, *, steps=None, factors=None, flips=None, planar=None, views=VIEWS, seed=0):
    """Random images, of black and white in every other batch, with a gap before each."""
    generator = torch.Generator("cpu").manual_seed(seed)
    B = len(sizes)
    areas = [3 * height * width for height, width in sizes]
    offsets = [sum(areas[:b]) + 5 * (b + 1) for b in range(B)]
    pixels = torch.randint(
        256, (sum(areas) + 5 * B,), dtype=torch.uint8, generator=generator, device="cpu"
    )
    pixels = (pixels > 127).to(torch.uint8) * 255 if seed % 2 else pixels
    steps = [[]] * B if steps is None else steps
    draw = torch.rand(len(steps), len(steps[0]) if B else 0, generator=generator, device="cpu")
    return {
        "pixels": pixels.to(torch.empty(0).device),
        "offsets": on_cpu(offsets),
        "sizes": on_cpu(sizes).view(B, 2),
        "boxes": on_cpu(boxes).view(B, 4),
        "flips": on_cpu(flips or [b % 2 == 1 for b in range(B)], torch.bool),
        "planar": on_cpu(planar or [b % 3 == 1 for b in range(B)], torch.bool),
        "steps": on_cpu(steps).view(draw.shape),
        "factors": 0.6 + 0.8 * draw if factors is None else on_cpu(factors, torch.float32),
        "views": views,
    }


def run(arguments, backend=None):
    first = ("pixels", "offsets", "sizes", "boxes", "flips")
    options = {name: value for name, value in arguments.items() if name not in first}
    return ragged_views(*(arguments[name] for name in first), **options, backend=backend)


def reference(arguments):
    """On the CPU: what it goes through there is checked by no one."""
    return ragged_views_reference(**arguments | {"pixels": arguments["pixels"].to("cpu")})


def assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        assert (our.shape, our.dtype) == (their.shape, torch.uint8)
        assert torch.equal(our.to("cpu"), their)


def random_sides(rng, most):
    small, wide, long = (most // 8, most // 8), (3, most), (most, 3)
    height, width = rng.choice([small, (most, most), (2 * most, most // 2), wide, long])
    return rng.randint(1, height), rng.randint(1, width)


def whole(sizes):
    return [(0, 0, *size) for size in sizes]


@pytest.mark.parametrize("make", [ragged_views_reference, None], ids=["reference", "torch"])
def test_the_bits_are_pillows_in_the_official_order(make):
    rng, columns = random.Random(0), 0
    for n in range(60):
        height, width = random_sides(rng, 500)
        size = (224, 224) if n % 3 else (rng.randint(1, 240), rng.randint(1, 240))
        config = ViewConfig(kind="reference", size=size, token_size=rng.randint(1, 112))
        drawn = draw_view(height, width, config, rng)
        if n % 2:
            drawn = dataclasses.replace(drawn, box=(0, 0, height, width))
        arguments = batch(
            [(height, width)],
            [drawn.box],
            steps=[[STEPS.index(name) for name, _ in drawn.jitter]],
            factors=[[factor for _, factor in drawn.jitter]],
            flips=[drawn.flip],
            planar=[False],
            views=(("bicubic", config.size), ("lanczos", config.token_size)),
            seed=n,
        )
        offset = int(arguments["offsets"])
        pixels = arguments["pixels"][offset:][: 3 * height * width].view(height, width, 3)
        wanted = reference_views(Image.fromarray(pixels.cpu().numpy()), drawn, config)
        ours = run(arguments) if make is None else reference(arguments)
        for view, name in zip(ours, ("images", "token_images"), strict=True):
            assert np.array_equal(view[0].cpu().numpy(), wanted[name]), (n, name)
        columns += any(columns_first(*drawn.box[2:], size) for _, size in arguments["views"])
    assert columns >= 10


def test_steps_at_the_ends_of_their_range_are_pillows():
    config = ViewConfig(kind="reference", size=8, token_size=4)
    for factors in ([0.0, 1.0, 2.5], [1.0, -0.5, 0.0], [3.0, 0.1, 1.0], [0.3, 7.0, -1.0]):
        for order in ([1, 2, 3], [3, 2, 1], [2, 3, 1]):
            arguments = batch([(8, 8)], whole([(8, 8)]), steps=[order], factors=[factors])
            arguments["views"] = (("bicubic", (8, 8)),)  # the crop as it is
            pixels = arguments["pixels"][5:].view(8, 8, 3).cpu().numpy()
            jitter = tuple(zip([STEPS[step] for step in order], factors, strict=True))
            drawn = SimpleNamespace(jitter=jitter, flip=False, box=(0, 0, 8, 8))
            wanted = reference_views(Image.fromarray(pixels), drawn, config)["images"]
            assert np.array_equal(run(arguments)[0][0].cpu().numpy(), wanted)
            assert np.array_equal(reference(arguments)[0][0].numpy(), wanted)


# Sizes, boxes, what else, views. Several programs of rows and of columns; boxes at every edge;
# columns first in some of a batch and in none; enlarged; one pixel; long images; every order.
SMALL = (("bicubic", (12, 10)), ("lanczos", (5, 6)))
BATCHES = {  # images, boxes if not whole, views
    "usual": ([(30, 40), (24, 20)], [(3, 8, 22, 27), (0, 0, 24, 20)], SMALL),
    "columns-first": ([(22, 9), (18, 12), (9, 20)], None, SMALL),
    "tiles": ([(19, 20), (5, 140)], None, (("bicubic", (5, 36)), ("bicubic", (3, 130)))),
    "one-pixel": ([(1, 1), (5, 7)], [(0, 0, 1, 1), (4, 6, 1, 1)], SMALL),
    "one-view": ([(9, 30)], None, (("lanczos", (1, 1)),)),
    "long": ([(1, 60), (60, 1)], None, (("bicubic", (8, 8)),)),
    "as-it-is": ([(12, 10)], None, SMALL),
}  # fmt: skip
STEPS_OF = {
    "none": [],
    "official": [BRIGHTNESS, CONTRAST, SATURATION],
    "contrast-last": [SATURATION, BRIGHTNESS, CONTRAST],
    "contrast-first": [CONTRAST, 0, SATURATION],
    "no-contrast": [SATURATION, BRIGHTNESS],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BATCHES)
def test_the_bits_are_those_of_the_reference(name, backend):
    sizes, boxes, views = BATCHES[name]
    arguments = batch(sizes, boxes or whole(sizes), views=views, seed=len(name))
    assert_same(run(arguments, backend), reference(arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STEPS_OF)
def test_so_are_those_of_jitter(name, backend):
    # The second image is of several programs, and the third takes no step.
    sizes, boxes = [(9, 14), (60, 45), (20, 16)], [(1, 2, 8, 9), (20, 5, 32, 36), (4, 4, 10, 8)]
    steps = [STEPS_OF[name], STEPS_OF[name], [0] * len(STEPS_OF[name])]
    arguments = batch(sizes, boxes, steps=steps, views=(("bicubic", (16, 18)),), seed=len(name))
    assert_same(run(arguments, backend), reference(arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_batch(backend):
    rng = random.Random(1)
    for n in range(3 if backend == "triton" else 12):
        sizes = [random_sides(rng, 24) for _ in range(n % 4 + 1)]
        boxes = []
        for height, width in sizes:
            top, left = rng.randrange(height), rng.randrange(width)
            boxes.append((top, left, rng.randint(1, height - top), rng.randint(1, width - left)))
        arguments = batch(
            sizes,
            boxes,
            steps=[rng.sample([0, 1, 2, 3], n % 4) for _ in sizes],
            flips=[rng.random() < 0.5 for _ in sizes],
            planar=[rng.random() < 0.5 for _ in sizes],
            views=[(f, (rng.randint(1, 12), rng.randint(1, 12))) for f in ("bicubic", "lanczos")],
            seed=n,
        )
        assert_same(run(arguments, backend), reference(arguments))


@pytest.mark.parametrize(("name", "num_out"), [("bicubic", 14), ("lanczos", 7)])
def test_weights_are_those_of_the_reference_to_the_bit(name, num_out, device):
    sides = on_cpu([1, 5, num_out, 2 * num_out])
    plan = make_plan(starts_of(sides), sides, sides.flip(0), name, (num_out, num_out + 1), 8)
    firsts, weights = make_weights(name, (num_out, num_out + 1), plan, plan.axes.to(device))
    firsts, weights = firsts.cpu(), weights.cpu()
    for axis, count in enumerate((num_out, num_out + 1)):
        for b, (num_in, start, taps) in enumerate(plan.axes[axis, : len(sides)].tolist()):
            first, wanted = resize_weights(name, num_in, count)
            assert torch.equal(firsts[axis, b, :count].long(), first)
            ours = weights[start : start + taps * count].view(taps, count)
            assert torch.equal(ours.long(), wanted), (num_in, count)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do_is_an_input(backend):
    none = batch([], [], steps=[])
    assert [view.shape for view in run(none, backend)] == [(0, 224, 224, 3), (0, 112, 112, 3)]
    assert_same(run(none, backend), reference(none))
    assert run(batch([(4, 4)], whole([(4, 4)]), views=()), backend) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_that_are_not_dense_are_read_as_they_are(backend):
    arguments = batch([(6, 5)], whole([(6, 5)]), views=(SMALL[0],))
    wide = torch.stack((arguments["pixels"], arguments["pixels"] + 1), dim=1)
    assert_same(run(arguments | {"pixels": wide[:, 0]}, backend), reference(arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a file of holes stands for 2 GiB of pixels")
@pytest.mark.parametrize("backend", BACKENDS)
def test_images_lie_more_than_two_gigabytes_apart(backend, tmp_path):
    arguments = batch(
        [(6, 5), (7, 4)], whole([(6, 5), (7, 4)]), steps=[[2, 1]] * 2, views=(SMALL[0],)
    )
    offsets, near = arguments["offsets"], arguments["pixels"]
    far = torch.from_file(str(tmp_path / "holes"), shared=True, size=2**31 + 200, dtype=torch.uint8)
    far[:95].copy_(near[:95])
    far[2**31 + 64 :][:84].copy_(near[int(offsets[1]) :][:84])
    there = arguments | {"pixels": far, "offsets": on_cpu([5, 2**31 + 64])}
    assert_same(run(there, backend), reference(arguments))


def test_what_no_image_asks_for_is_not_launched():
    def kernels_of(arguments):
        with record() as launches:
            run(arguments, "triton")
        return [launch.kernel.fn.__name__ for launch in launches]

    resized = ["resize_weights_kernel", "resize_pass_kernel", "resize_pass_kernel"]
    sizes, one = [(20, 20), (20, 30)], (("bicubic", (8, 8)),)
    plain = batch(sizes, whole(sizes), views=one)
    assert kernels_of(plain) == ["jittered_crop_kernel", *resized]
    steps = [[BRIGHTNESS, SATURATION]] * 2
    assert kernels_of(batch(sizes, whole(sizes), steps=steps, views=one)) == kernels_of(plain)
    grey = ["grey_sums_kernel", "grey_means_kernel"]
    steps = [[BRIGHTNESS, SATURATION], [0, CONTRAST]]
    contrast = batch(sizes, whole(sizes), steps=steps, views=one)
    assert kernels_of(contrast) == [*grey, *kernels_of(plain)]
    assert kernels_of(batch([(90, 8)], whole([(90, 8)]), views=one)) == kernels_of(plain)
    mixed = batch([(90, 8), (8, 90)], whole([(90, 8), (8, 90)]), views=one)
    assert kernels_of(mixed) == [*kernels_of(plain), "resize_pass_kernel"]


def test_jitter_is_compiled_without_fused_products():
    with record() as launches:
        run(batch([(4, 4)], whole([(4, 4)]), steps=[[1, 2, 3]], views=()), "triton")
    jitter = ("grey_sums_kernel", "jittered_crop_kernel")
    fusion = [x.options.get("enable_fp_fusion") for x in launches if x.kernel.fn.__name__ in jitter]
    assert fusion == [False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_passes_opcheck_and_compiles_in_one_graph(backend, device):
    views = (("bicubic", (2, 2)), ("bicubic", (1, 3)))
    arguments = batch([(3, 2)], whole([(3, 2)]), steps=[[2, 3]], views=views)
    pixels, *rest, views = arguments.values()
    names, sides = [name for name, _ in views], [side for _, size in views for side in size]
    operator = torch.ops.beit_fast.ragged_views.default
    torch.library.opcheck(operator, (pixels, *rest, names, sides, backend))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled(arguments, backend), reference(arguments))


def test_what_does_not_fit_is_refused_by_name():
    good = batch([(6, 5), (4, 4)], whole([(6, 5), (4, 4)]), steps=[[1, 2], [0, 3]], views=SMALL)

    def refused(message, **wrong):
        with pytest.raises(ValueError, match=message):
            run(good | wrong)

    refused(
        r"the pixels are torch.uint8 \(2, 3\): pass uint8 \(P,\)", pixels=torch.zeros(2, 3).byte()
    )
    refused(r"sizes is torch.int32 \(2, 2\): pass int64 \(2, 2\)", sizes=good["sizes"].int())
    refused(r"boxes is torch.int64 \(1, 4\): pass int64 \(2, 4\)", boxes=good["boxes"][:1])
    refused(r"steps is .*\(1, 2\): pass int64 \(2, 2\)", steps=good["steps"][:1])
    refused(r"factors is torch.int64 \(2, 2\): pass floats \(2, 2\)", factors=good["steps"])
    refused("pass steps and factors, or neither", steps=None)
    refused(r"hold \('box', \(2, 2\)\): pass bicubic or lanczos", views=[("box", (2, 2))])
    refused("of 1 to 2048 pixels", views=[("bicubic", (2049, 2))])
    refused("of 1 to 2048 pixels", views=[("bicubic", (0, 2))])
    refused("image 1 is 4x4 pixels at 200 of 148 bytes", offsets=on_cpu([5, 200]))
    refused("image 0 is 6x5 pixels at -1 of", offsets=on_cpu([-1, 20]))
    refused("image 1 is 0x4 pixels", sizes=on_cpu([[6, 5], [0, 4]]))
    refused(f"of 1 to {MOST_SIDE} pixels a side", sizes=on_cpu([[6, 5], [2**62, 4]]))
    box = re.escape("box 1 is (0, 1, 4, 4) in 4x4 pixels: pass top, left")
    refused(box, boxes=on_cpu([[0, 0, 6, 5], [0, 1, 4, 4]]))
    refused("box 0 is", boxes=on_cpu([[0, 0, 6, 0], [0, 0, 4, 4]]))
    refused("box 0 is", boxes=on_cpu([[0, 1, 6, 2**63 - 1], [0, 0, 4, 4]]))
    refused(r"steps of image 1 are \[4, 0\]", steps=on_cpu([[1, 2], [4, 0]]))
    refused("contrast once at most", steps=on_cpu([[2, 2], [0, 0]]))
    refused("and finite factors", factors=on_cpu([[1, float("nan")], [0, 0]], torch.float32))
    with pytest.raises(ValueError, match="pass one of triton, torch, or None"):
        run(good, "cuda")


def test_what_decides_the_launches_is_wanted_on_the_cpu():
    arguments = batch([(4, 4)], whole([(4, 4)]))
    for name in ("offsets", "sizes", "boxes", "flips", "planar", "steps", "factors"):
        with pytest.raises(ValueError, match=f"{name} is on meta: pass it on the CPU"):
            run(arguments | {name: arguments[name].to("meta")})


def test_a_fallback_on_cuda_says_why_once_and_a_wish_is_refused(monkeypatch):
    monkeypatch.setattr(_triton, "_warned", set())
    monkeypatch.setattr(_triton, "can_launch", lambda tensor: True)
    pixels = SimpleNamespace(device=torch.device("cuda"))
    reason = r"need compute capability 8.0, this GPU has \(7, 5\)"
    with pretend(Gpu((7, 5), 132, 1 << 20)):
        with pytest.warns(UserWarning, match=f"ragged_views runs on torch, slower: .*{reason}"):
            assert operator._resolve("", pixels) == "torch"
        assert operator._resolve("", pixels) == "torch"  # a second is an error
        with pytest.raises(ValueError, match=f"cannot run here: .*{reason}"):
            operator._resolve("triton", pixels)
