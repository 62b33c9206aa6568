"""A kernel that does not compile: torch gives the result and the gradients, and it is said once."""

import warnings

import pytest
import torch

from beit_fast.kernels import _triton
from beit_fast.kernels._triton import KernelError
from beit_fast.kernels.attention import attention, rel_pos_attention_qkvpacked
from beit_fast.kernels.attention import rel_pos_bias as table_module
from beit_fast.kernels.attention.backends import Choice, triton_obstacle, warn_of_fallback
from beit_fast.kernels.conv.operators import conv
from beit_fast.kernels.conv.pixels import conv_pixels
from beit_fast.kernels.head import gather_rows as gather_module
from beit_fast.kernels.head import linear_argmax as argmax_module
from beit_fast.kernels.head import linear_cross_entropy as loss_module
from beit_fast.kernels.input import mask_embed as embed_module
from beit_fast.kernels.input import patches as patches_module
from beit_fast.kernels.residual.functional import scale_residual_norm
from faults import Injector, fired

pytestmark = pytest.mark.promise("R22")


def on(device, *shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(device)


def attend(device, backend):
    q, k, v, bias = on(device, 2, 5, 2, 16), *(on(device, 2, 7, 2, 16) for _ in "kv"), None
    bias = on(device, 2, 5, 7)
    options = {"dropout_p": 0.2, "rng": torch.tensor([3, 4]).to(device), "return_lse": True}
    return (q, k, v, bias), lambda: attention(q, k, v, bias, backend=backend, **options)


def attend_packed(device, backend):
    qkv, table = on(device, 2, 7, 3, 2, 16), on(device, 18, 2)
    options = {"backend": backend, "return_lse": True}
    return (qkv, table), lambda: rel_pos_attention_qkvpacked(qkv, table, (2, 3), **options)


def expand(device, backend):
    table = on(device, 18, 2)
    return (table,), lambda: (table_module.rel_pos_bias(table, (2, 3)),)


def residual(device, backend):
    x, branch, weight, bias, gamma = on(device, 2, 3, 16), on(device, 2, 3, 16), *on(device, 3, 16)
    inputs = tuple(t.clone() for t in (x, branch, weight, bias, gamma))
    return inputs, lambda: scale_residual_norm(*inputs, backend=backend)


def embed(device, backend):
    inputs = (on(device, 2, 4, 16), on(device, 16), on(device, 16))
    mask, pos = (torch.arange(8).view(2, 4) % 3 == 0).to(device), on(device, 5, 16)
    call = embed_module.mask_embed
    wish = None if backend == "triton" else backend  # what stands in for a GPU chooses below
    return (*inputs, pos), lambda: (call(*inputs, mask, pos, backend=wish),)


def cut(device, backend):
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8).to(device)
    wish = None if backend == "triton" else backend
    call = patches_module.normalized_patches
    return (), lambda: (call(images, (4, 4), (0.5,) * 3, (0.5,) * 3, backend=wish),)


def gather(device, backend):
    x, index = on(device, 2, 3, 16), torch.tensor([4, 1, -1, 4]).to(device)
    wish = None if backend == "triton" else backend
    return (x,), lambda: (gather_module.gather_rows(x, index, backend=wish),)


def loss(device, backend, reduction="mean"):
    inputs = (on(device, 2, 3, 16), on(device, 20, 16), on(device, 20), on(device, 16))
    x, weight, bias, norm_weight = inputs
    index, target = torch.tensor([4, 1, -1]).to(device), torch.tensor([3, 19, 0]).to(device)
    wish = None if backend == "triton" else backend
    options = {"reduction": reduction, "backend": wish}
    call = loss_module.masked_linear_cross_entropy
    return inputs, lambda: call(x, index, target, weight, bias, norm_weight, **options)[:1]


def losses(device, backend):
    return loss(device, backend, reduction="none")


def best(device, backend):
    x, weight = on(device, 3, 16), on(device, 20, 16)
    wish = None if backend == "triton" else backend
    return (), lambda: (argmax_module.linear_argmax(x, weight, backend=wish),)


def convolve(device, backend, overwrite=False):
    x, weight, bias = on(device, 2, 4, 4, 8), on(device, 8, 3, 3, 8), on(device, 8)
    x, weight, added = (t.half() for t in (x, weight, on(device, 2, 4, 4, 8)))
    options = {"relu": True, "pool": True, "overwrite": overwrite, "backend": backend}
    return (), lambda: (conv(x, weight, bias, added.clone(), **options),)


def convolve_into(device, backend):
    x, weight, bias = on(device, 2, 4, 4, 8), on(device, 8, 3, 3, 8), on(device, 8)
    x, weight, added = (t.half() for t in (x, weight, on(device, 2, 4, 4, 8)))
    options = {"overwrite": True, "backend": backend}
    return (), lambda: (conv(x, weight, bias, added.clone(), **options),)


def convolve_pixels(device, backend):
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8).to(device)
    weight, bias = on(device, 8, 3, 3, 3).half(), on(device, 8)
    options = {"scale": 1 / 255, "fill": 0.1, "backend": backend}
    return (), lambda: (conv_pixels(pixels, weight, bias, **options),)


REFERENCE = {attend: "reference", attend_packed: "reference"}
CASES = {
    attend: "attention",
    attend_packed: "attention",
    expand: "rel_pos_bias",
    residual: "scale_residual",
    embed: "mask_embed",
    cut: "normalized_patches",
    gather: "gather_rows",
    loss: "masked_linear_cross_entropy",
    losses: "masked_linear_cross_entropy",
    best: "linear_argmax",
    convolve: "conv",
    convolve_into: "conv",
    convolve_pixels: "conv_pixels",
}
DIFFERENTIABLE = (attend, attend_packed, expand, residual, embed, gather, loss, losses)


@pytest.fixture
def failing(monkeypatch, tmp_path, request):
    """`failing(fault)`: from now on each launch has it. Kernels are chosen as on a GPU."""
    armed, launched = [], []
    run = _triton._run

    def launch(kernel, grid, arguments):
        launched.append(kernel.__name__)
        for injector in armed:
            injector.meet("launch", 1, kernel.__name__)
        run(kernel, grid, arguments)

    def on_a_gpu(resolve):
        def chosen(*arguments):
            default = any(argument in ("", None) for argument in arguments)
            changed = ["triton" if a in ("", None) else a for a in arguments]
            try:
                return resolve(*changed)
            except ValueError:
                if not default:
                    raise
                return "torch"

        return chosen

    monkeypatch.setattr(_triton, "_run", launch)
    monkeypatch.setattr(_triton, "_warned", set())
    _triton._failed.clear()
    if "expand" in request.node.name:  # elsewhere attention's own kernels expand the table
        monkeypatch.setattr(table_module, "_takes_kernels", lambda _: True)
    for module in (embed_module, patches_module, gather_module, loss_module, argmax_module):
        monkeypatch.setattr(module, "_resolve", on_a_gpu(module._resolve))

    def arm(fault):
        armed.append(Injector(tmp_path, [f"0:1:{fault}"], again=1000))

    yield arm, launched
    _triton._failed.clear()


def results(case, device, backend, before_backward=lambda: None):
    """Outputs and gradients."""
    torch.manual_seed(0)
    inputs, call = case(device, backend)
    if case not in DIFFERENTIABLE:
        return list(call())
    for tensor in inputs:
        tensor.requires_grad_()
    outputs = list(call())
    before_backward()
    weights = (torch.linspace(0, 1, o.numel()).view(o.shape).to(device) for o in outputs)
    sum((o * weight).sum() for o, weight in zip(outputs, weights, strict=True)).backward()
    return [*outputs, *(tensor.grad for tensor in inputs)]


def assert_close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        tolerance = {"atol": 2e-2, "rtol": 2e-2} if mine.dtype == torch.float16 else {}
        torch.testing.assert_close(mine.detach(), other.detach(), **tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_result_is_torchs_and_none_is_tried_again(case, device, failing, tmp_path):
    fail, launched = failing
    expected = results(case, device, REFERENCE.get(case, "torch"))
    fail("compile")
    launched.clear()
    with pytest.warns(UserWarning, match=f"^{CASES[case]} runs on torch, slower") as said:
        assert_close(results(case, device, "triton"), expected)
    assert fired(tmp_path)["0:1:compile"] == len(launched) == len(said) == 1
    (warning,) = said
    assert launched[0] in str(warning.message)
    assert "(CompilationError: unsupported construct); another version of" in str(warning.message)
    if case in (attend, attend_packed, residual, convolve, convolve_into, convolve_pixels):
        with pytest.raises(
            ValueError, match=r"'triton' cannot run here: its kernel .*backend=None"
        ):
            results(case, device, "triton")
    else:
        assert_close(results(case, device, "triton"), expected)
    assert len(launched) == 1


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.__name__)
def test_a_backward_whose_kernel_does_not_compile_is_torchs_too(case, device, failing, tmp_path):
    fail, _ = failing
    expected = results(case, device, REFERENCE.get(case, "torch"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = results(case, device, "triton", before_backward=lambda: fail("resources"))
    assert_close(ours, expected)
    # The gradients of the mean loss are there from its forward; their scatter is a kernel.
    assert fired(tmp_path)["0:1:resources"] == len(said) == 1
    assert "out of resource: shared memory, Required: 300000" in str(said[0].message)


def test_attention_as_a_whole_is_chosen_elsewhere_from_then_on(device, failing):
    fail, _ = failing
    fail("compile")
    with pytest.warns(UserWarning, match="attention runs on torch"):
        results(attend, device, "triton")
    choice = Choice("sdpa", fallback=triton_obstacle(on(device, 2, 5, 2, 16)))
    assert "does not compile" in choice.fallback
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_fallback(choice)  # which was said


def test_what_is_wrong_on_the_device_or_with_the_call_is_not_mended(device, failing, tmp_path):
    fail, _ = failing
    fail("access")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        results(gather, device, "triton")
    assert fired(tmp_path)["0:1:access"] == 1
    with pytest.raises(ValueError, match=r"pass \(B, N, D\)"):
        gather_module.gather_rows(on(device, 3), torch.tensor([0]).to(device))
    assert not _triton._failed


@pytest.mark.parametrize("fault", ["compile", "resources", "passes"])
def test_whoever_asked_for_the_kernels_gets_the_reason(fault, device, failing, tmp_path):
    fail, _ = failing
    fail(fault)
    patches, cls_token = on(device, 2, 4, 16), on(device, 16)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here: its kernel \w+ does"):
        embed_module.mask_embed(patches, cls_token, backend="triton")
    assert fired(tmp_path)[f"0:1:{fault}"] == 1
    embed_module.mask_embed(patches, cls_token, backend="torch")  # as it says


def test_with_warnings_as_errors_nothing_falls_back(device, failing):
    fail, _ = failing
    fail("compile")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # and not at the second try either
            with pytest.raises(UserWarning, match="gather_rows runs on torch"):
                results(gather, device, "triton")


def test_inside_a_capture_the_error_is_raised(device, failing, monkeypatch):
    fail, _ = failing
    fail("compile")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KernelError, match="does not compile"):
        results(gather, device, "triton")


def test_a_compiled_graph_falls_back_too(device, failing):
    fail, launched = failing
    x, index = on(device, 2, 3, 16), torch.tensor([4, 1, -1, 4]).to(device)

    def call(x):
        return torch.ops.beit_fast.gather_rows(x, index, "triton")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    fail("compile")
    launched.clear()
    with pytest.warns(UserWarning, match="gather_rows runs on torch"):
        ours = compiled(x)
    assert_close([ours], [gather_module.gather_rows(x, index, backend="torch")])
