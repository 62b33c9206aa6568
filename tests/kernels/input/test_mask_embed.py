"""By hand: the kernels in Triton's interpreter; by default on a CPU: torch's own operators."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from beit_fast.kernels import _triton
from beit_fast.kernels._triton import Gpu, pretend, record
from beit_fast.kernels.input import mask_embed as module
from beit_fast.kernels.input import mask_embed_kernels
from beit_fast.kernels.input.mask_embed import mask_embed, mask_embed_reference

BACKENDS = ("triton", "torch")
NAMES = ("patches", "cls_token", "mask_token", "mask", "pos")


pytestmark = pytest.mark.usefixtures("new_memory_is_nan")


def inputs(B, L, D, with_mask=True, with_pos=True):
    patches, cls_token, mask_token = torch.randn(B, L, D), torch.randn(D), torch.randn(D)
    mask = torch.rand(B, L) < 0.4
    pos = torch.randn(L + 1, D) if with_pos else None
    return [patches, cls_token, *((mask_token, mask) if with_mask else (None, None)), pos]


def run(function, tensors, **options):
    """The output and the gradients of all floating inputs."""
    leaves = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    out = function(*leaves, **options)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    trained = [t for t in leaves if t is not None and t.requires_grad]
    return [out, *torch.autograd.grad(out, trained, dout)]


def assert_same_to_rounding(ours, theirs):
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert (our.shape, our.dtype) == (their.shape, their.dtype)
        if their.numel():
            allowed = 16 * torch.finfo(our.dtype).eps * their.abs().max().clamp(min=1)
            assert (our - their).abs().max() <= allowed, f"result {number}"


# Widths: three chunks; a power of two; no multiple of 16 bytes; more chunks, with a rest.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [192, 768, 1024, 37, 1408])
def test_as_exact_as_the_reference(assert_as_exact_as_reference, D, dtype, backend):
    assert_as_exact_as_reference(
        lambda *t: mask_embed(*t, backend=backend), mask_embed_reference, inputs(5, 4, D), dtype
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_pos", [True, False], ids=["pos", "no-pos"])
@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no-mask"])
def test_the_sequence_has_the_bits_of_the_reference(with_mask, with_pos, backend):
    kinds = (torch.float32, torch.bfloat16)
    for patches_dtype, dtype in itertools.product(kinds, (None, *kinds)):
        tensors = inputs(2, 5, 48, with_mask, with_pos)
        tensors[0] = tensors[0].to(patches_dtype)
        ours = run(mask_embed, tensors, dtype=dtype, backend=backend)
        theirs = run(mask_embed_reference, tensors, dtype=dtype)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])  # dpatches: a copy
        assert_same_to_rounding(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", ["all", "none", "one image"])
def test_the_extremes_of_a_mask(masked, backend):
    tensors = inputs(3, 4, 32)
    tensors[3] = torch.full((3, 4), masked == "all")
    if masked == "one image":
        tensors[3][1] = True
    ours = run(mask_embed, tensors, backend=backend)
    assert_same_to_rounding(ours, run(mask_embed_reference, tensors))
    assert ours[1][tensors[3]].count_nonzero() == 0
    assert (ours[3].count_nonzero() == 0) == (masked == "none")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_hidden_may_be_nan(backend):
    tensors = inputs(2, 6, 32)
    tensors[0][tensors[3]] = torch.nan
    assert not any(t.isnan().any() for t in run(mask_embed, tensors, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_and_stride(backend):
    rng = random.Random(0)
    for D in (1, 8, 30, 200, 260):
        B, L = rng.randint(1, 7), rng.randint(1, 7)
        tensors = inputs(B, L, D, rng.random() < 0.7, rng.random() < 0.5)
        dense = run(mask_embed_reference, tensors)
        spread = [None if t is None else torch.stack((t, t), dim=-1)[..., 0] for t in tensors]
        assert_same_to_rounding(run(mask_embed, spread, backend=backend), dense)
        turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors[:1]]
        ours = run(mask_embed, turned + tensors[1:], backend=backend)
        assert_same_to_rounding(ours, dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_any_stride(backend, device):
    tensors = [t.to(device) for t in inputs(3, 4, 32)]
    patches = tensors[0].requires_grad_()
    mask_token = tensors[2].requires_grad_()
    for dout in (
        torch.randn(32, 5, 3, device=device).permute(2, 1, 0),
        torch.randn(32, device=device).expand(3, 5, 32),
    ):
        results = [
            torch.autograd.grad(function(*tensors), (patches, mask_token), dout)
            for function in (lambda *t: mask_embed(*t, backend=backend), mask_embed_reference)
        ]
        assert_same_to_rounding(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "L"), [(0, 4), (2, 0), (0, 0)], ids=str)
def test_nothing_to_do_is_an_input(B, L, backend):
    tensors = inputs(B, L, 16)
    assert_same_to_rounding(
        run(mask_embed, tensors, backend=backend), run(mask_embed_reference, tensors)
    )


def test_positions_and_images_are_shared_out_among_programs():
    """More positions than programs, and more images than a share has."""
    tensors = inputs(7, 6, 16)
    expected = run(mask_embed_reference, tensors)
    for num_sms in (1, 2):
        with pretend(Gpu((9, 0), num_sms, 1 << 20)), pytest.MonkeyPatch.context() as patch:
            for resident in (1, 5, 28):
                patch.setattr(mask_embed_kernels, "_num_resident", lambda *_, r=resident: r)
                assert_same_to_rounding(run(mask_embed, tensors, backend="triton"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_trained_has_a_gradient(backend, device):
    for trained in itertools.product((False, True), repeat=4):
        tensors = [t.to(device) for t in inputs(2, 3, 16)]
        leaves = [t for t in tensors if t.is_floating_point()]
        for leaf, needed in zip(leaves, trained, strict=True):
            leaf.requires_grad_(needed)
        out = mask_embed(*tensors, backend=backend)
        assert out.requires_grad == any(trained)
        if any(trained):
            out.square().sum().backward()
            got = [t.grad for t in leaves]
            wanted = [t for t, needed in zip(leaves, trained, strict=True) if needed]
            expected = torch.autograd.grad(mask_embed_reference(*tensors).square().sum(), wanted)
            assert [g is not None for g in got] == list(trained)
            assert_same_to_rounding([g for g in got if g is not None], expected)


@pytest.mark.parametrize(
    ("trained", "written"),
    [
        (("patches",), {"dpatches_ptr"}),
        (("mask_token",), {"dmask_token_ptr"}),
        (("cls_token", "pos"), {"dpos_ptr"}),
        (("cls_token",), None),
    ],
    ids=str,
)
def test_what_is_frozen_is_not_written(trained, written):
    if not torch.cuda.is_available():
        tensors = dict(zip(NAMES, inputs(2, 3, 32), strict=True))
        for name in trained:
            tensors[name].requires_grad_()
        out = mask_embed(**tensors, backend="triton")
        with record() as launches:
            out.backward(torch.ones_like(out))
        outputs = ("dpatches_ptr", "dmask_token_ptr", "dpos_ptr")
        assert len(launches) == (written is not None)
        if launches:
            arguments = launches[0].arguments
            assert {name for name in outputs if arguments[name] is not None} == written


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operators_pass_opcheck(backend, device):
    tensors = [t.to(device).requires_grad_(t.is_floating_point()) for t in inputs(2, 3, 32)]
    forward = torch.ops.beit_fast.mask_embed.default
    for each in (tensors, [*tensors[:2], None, None, None]):
        torch.library.opcheck(forward, (*each, torch.float32, backend))
    dout, mask = torch.randn(2, 4, 32, device=device), tensors[3]
    backward = torch.ops.beit_fast.mask_embed_backward.default
    for needs in ([True] * 4, [True, True, False, False], [False, False, True, False]):
        for each in (dout, torch.randn(32, 4, 2, device=device).permute(2, 1, 0)):
            torch.library.opcheck(backward, (each, mask, torch.bfloat16, needs, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend, device):
    tensors = [t.to(device) for t in inputs(2, 3, 32)]
    compiled = torch.compile(mask_embed, fullgraph=True, backend="aot_eager")
    ours = run(compiled, tensors, backend=backend)
    assert_same_to_rounding(ours, run(mask_embed_reference, tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_stream_in_the_dtype_of_the_parameters(backend, device):
    tensors = [t.to(device) for t in inputs(2, 3, 32)]
    tensors[0] = tensors[0].bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        ours = run(mask_embed, tensors, backend=backend)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == torch.bfloat16
    assert_same_to_rounding(ours, run(mask_embed_reference, tensors))


def test_what_does_not_fit_is_refused_by_name():
    patches, cls_token, mask_token, mask, pos = inputs(2, 3, 32)
    with pytest.raises(ValueError, match=r"the patches are \(3, 32\): pass \(B, L, D\)"):
        mask_embed(patches[0], cls_token)
    with pytest.raises(ValueError, match=r"cls_token is \(31,\): pass \(32,\)"):
        mask_embed(patches, cls_token[1:])
    with pytest.raises(ValueError, match=r"mask_token is \(31,\): pass \(32,\)"):
        mask_embed(patches, cls_token, mask_token[1:], mask)
    with pytest.raises(ValueError, match=r"the mask is torch.bool \(2, 2\): pass bool \(2, 3\)"):
        mask_embed(patches, cls_token, mask_token, mask[:, 1:])
    with pytest.raises(ValueError, match="a mask came without a mask_token"):
        mask_embed(patches, cls_token, None, mask)
    with pytest.raises(ValueError, match=r"pos is \(3, 32\): pass \(4, 32\), \[CLS\] first"):
        mask_embed(patches, cls_token, pos=pos[1:])
    with pytest.raises(ValueError, match="pass one of triton, torch, or None"):
        mask_embed(patches, cls_token, backend="cuda")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"shape": (2, 3, 8200)}, "rows of up to 8192 channels, not 8200"),
        ({"shape": (2**15, 2**15, 64)}, "fewer than 1073741824 rows"),
        ({"capability": (7, 5)}, r"need compute capability 8.0, this GPU has \(7, 5\)"),
    ],
    ids=["fp64", "wide", "many-rows", "old-gpu"],
)
def test_a_fallback_on_cuda_says_why_once_and_a_wish_is_refused(fields, reason, monkeypatch):
    monkeypatch.setattr(_triton, "_warned", set())
    monkeypatch.setattr(_triton, "can_launch", lambda tensor: True)
    fields = {"dtype": torch.float32, "shape": (2, 3, 64), "capability": (9, 0)} | fields
    x = SimpleNamespace(device=torch.device("cuda"), dtype=fields["dtype"], shape=fields["shape"])
    with pretend(Gpu(fields["capability"], 132, 1 << 20)):
        with pytest.warns(UserWarning, match=f"runs on torch, slower: .*{reason}"):
            assert module._resolve("", x, torch.float32) == "torch"
        assert module._resolve("", x, torch.float32) == "torch"  # a second is an error
        with pytest.raises(ValueError, match=f"cannot run here: .*{reason}"):
            module._resolve("triton", x, torch.float32)
