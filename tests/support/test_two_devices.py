"""The stand-in for a GPU machine refuses what CUDA refuses, and nothing else."""

import copy

import pytest
import torch
from torch import Tensor, nn

from beit_fast.kernels._triton import launch, launch_obstacle, tl, triton
from beit_fast.kernels.head.gather_rows import gather_rows
from beit_fast.kernels.input.mask_embed import mask_embed
from two_devices import CPU, GPU

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU to mix with")
MIXED = "Expected all tensors to be on the same device"


@pytest.fixture(autouse=True)
def _mode(device):
    assert device == GPU


@triton.jit
def _double_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, 2 * tl.load(x_ptr + at))


def double(x: Tensor, out: Tensor) -> Tensor:
    launch(_double_kernel, (1,), on=x, x_ptr=x, out_ptr=out, BLOCK=4)
    return out


class Doubled(torch.autograd.Function):
    """Its backward launches a kernel on what forward saved."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return 2 * x

    @staticmethod
    def backward(ctx, dout):
        (scale,) = ctx.saved_tensors
        return double(scale, torch.empty_like(dout)), None


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.ones(4),
        lambda: torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda: torch.randn(4),
        lambda: torch.ones(4, device=GPU).cpu(),
        lambda: torch.ones(4, device=GPU).to("cpu"),
        lambda: torch.ones(4, device=GPU).to(torch.ones(1)),
        lambda: torch.ones(4, device=GPU).to("cpu", torch.float64),
        lambda: nn.Linear(4, 1).weight[0],
        lambda: torch.from_numpy(torch.ones(4).numpy()),
    ],
)
def test_an_operation_that_mixes_is_refused_and_one_that_moved_is_not(made):
    here, there = made(), torch.arange(4.0, device=GPU)
    assert here.device == CPU
    with pytest.raises(RuntimeError, match=MIXED):
        here * there
    with pytest.raises(RuntimeError, match=MIXED):
        torch.stack((there, here))
    assert (here.to(GPU) * there).device == (here.to(device=GPU) * there).device == GPU
    assert (here * there.cpu()).device == CPU


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.ones(4, device=GPU),
        lambda: torch.tensor([1.0] * 4, device=GPU),
        lambda: torch.ones(4, device=GPU)[None].expand(2, 4).sum(0),
        lambda: torch.ones(4, device="cpu").to(GPU),
        lambda: torch.ones(4, device=GPU).new_tensor([0.0] * 4),
        lambda: torch.ones(4, device=GPU).new_zeros(4),
        lambda: copy.deepcopy(nn.Linear(4, 1).to(GPU)).weight[0],
        lambda: torch.randn(4, generator=torch.Generator(GPU), device=GPU),
    ],
)
def test_what_is_made_on_the_gpu_knows_it(made):
    tensor = made()
    assert tensor.device == GPU
    assert tensor.device.type == "cpu"
    with pytest.raises(RuntimeError, match=MIXED):
        tensor + torch.ones(4)
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
        tensor.detach().numpy()
    with GPU:
        assert torch.equal(tensor + torch.ones(4), tensor + torch.tensor([1.0] * 4))


def test_what_torch_lets_through_passes():
    there, here = torch.arange(4.0, device=GPU), torch.ones(4)
    assert (there * torch.tensor(2.0)).device == GPU
    assert there[torch.tensor([1, 3])].tolist() == [1.0, 3.0]
    there[torch.tensor([0])] = 5.0
    assert there[0].item() == 5.0
    here.copy_(there)
    there.copy_(here)
    assert here.tolist() == there.tolist()


def test_what_torch_refuses_beyond_two_vectors_is_refused():
    there, here = torch.arange(4, device=GPU), torch.arange(4)
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        here[there]
    with pytest.raises(RuntimeError, match=MIXED):
        there[[0, 1]] = here[:2]
    with pytest.raises(RuntimeError, match=MIXED):
        torch.zeros(()).add_(torch.zeros((), device=GPU))
    with pytest.raises(RuntimeError, match=MIXED):
        torch.stack([torch.zeros((), device=GPU), torch.zeros(())])
    with pytest.raises(RuntimeError, match=MIXED):
        nn.Linear(4, 2)(torch.zeros(1, 4, device=GPU))


def test_a_kernel_takes_tensors_of_the_gpu_alone():
    x = torch.arange(4.0, device=GPU)
    assert double(x, torch.empty_like(x)).tolist() == [0.0, 2.0, 4.0, 6.0]
    assert launch_obstacle(x, x.dtype) is None
    assert launch_obstacle(x.cpu(), x.dtype) == "Triton has no kernels for cpu tensors"
    for tensors in ((x, torch.empty(4)), (torch.ones(4), x)):
        with pytest.raises(ValueError, match=r"cannot be accessed from Triton \(cpu tensor\?\)"):
            double(*tensors)


def test_backward_is_checked_as_forward_is():
    x = torch.ones(4, device=GPU, requires_grad=True)
    Doubled.apply(x, torch.arange(4.0, device=GPU)).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 4.0, 6.0]
    assert x.grad.device == GPU
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        Doubled.apply(x, torch.ones(4)).sum().backward()
    with pytest.raises(RuntimeError, match=MIXED):
        (x * x).backward(torch.ones(4))


def test_what_names_no_device_is_made_on_the_one_that_is_named_around_it():
    for place, name in ((CPU, "cpu"), (GPU, GPU)):
        with torch.device(name):
            assert torch.tensor([1.0]).device == place


def test_a_gradient_comes_back_to_where_its_tensor_is():
    x = torch.ones(4, requires_grad=True)
    (x.to(GPU) * torch.arange(4.0, device=GPU)).sum().backward()
    assert x.grad.device == CPU
    assert (x.grad * torch.ones(4)).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_operators_of_the_package_are_checked_inside():
    patches = torch.randn(2, 3, 8, device=GPU)
    assert mask_embed(patches, torch.zeros(8, device=GPU), backend="triton").device == GPU
    with pytest.raises((RuntimeError, ValueError), match=r"same device|from Triton"):
        mask_embed(patches, torch.zeros(8), backend="triton")
    x, index = torch.randn(2, 3, 8, device=GPU), torch.tensor([1, 4], device=GPU)
    assert gather_rows(x, index, backend="triton").device == GPU
    with pytest.raises((RuntimeError, ValueError), match=r"same device|from Triton"):
        gather_rows(x, index.cpu(), backend="triton")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_is_checked_while_it_is_traced(backend):
    compiled = torch.compile(lambda x, y: x * y, fullgraph=True, backend=backend)
    x = torch.ones(4, device=GPU)
    assert compiled(x, x).device == GPU
    with pytest.raises(Exception, match="device"):
        compiled(x, torch.ones(4))
