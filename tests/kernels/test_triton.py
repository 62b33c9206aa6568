"""What launchers share: obstacles are named, fallbacks told once, empty grids not launched."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from beit_fast.kernels import _triton
from beit_fast.kernels._triton import (
    A100,
    B200,
    H100,
    RTX3090,
    RTX4090,
    RTX5090,
    Gpu,
    gpu_of,
    launch,
    launch_obstacle,
    pretend,
    record,
    tl,
    triton,
    warn_once,
)


@triton.jit
def _fill_kernel(out_ptr, value, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), value)


def test_a_launch_runs_on_every_program(device):
    out = torch.full((64,), torch.nan, device=device)
    launch(_fill_kernel, (4,), on=out, out_ptr=out, value=3.0, BLOCK=16)
    assert (out == 3).all()


def test_an_empty_grid_launches_nothing(device):
    out = torch.full((64,), torch.nan, device=device)
    launch(_fill_kernel, (0,), on=out, out_ptr=out, value=3.0, BLOCK=16)
    assert out.isnan().all()


def test_a_recorded_launch_does_not_run(device):
    out = torch.full((64,), torch.nan, device=device)
    with record() as launches:
        launch(_fill_kernel, (4,), on=out, num_warps=2, out_ptr=out, value=3.0, BLOCK=16)
    assert out.isnan().all()
    assert [(each.grid, each.options["num_warps"]) for each in launches] == [((4,), 2)]


def test_what_no_kernel_takes_is_named(device):
    x = torch.zeros(1, device=device)
    assert launch_obstacle(x, torch.float32, torch.bfloat16) is None
    assert "not torch.float64" in launch_obstacle(x, torch.float32, torch.float64)
    with pretend(Gpu((7, 5), 40, 4 << 20)):
        assert "this GPU has (7, 5)" in launch_obstacle(x, torch.float32)


def test_the_pretended_gpu_is_the_innermost():
    x = torch.zeros(1, device="cpu")
    with pretend(B200):
        with pretend(H100):
            assert gpu_of(x) == H100
        assert gpu_of(x) == B200


@pytest.mark.parametrize("gpu", [A100, RTX3090, RTX4090, H100, B200, RTX5090], ids=str)
def test_the_gpu_is_read_from_the_properties_of_the_device(gpu, monkeypatch):
    major, minor = gpu.capability
    properties = SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=gpu.num_sms,
        L2_cache_size=gpu.l2_bytes,
        shared_memory_per_block_optin=gpu.shared_bytes,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu_of(SimpleNamespace(device=torch.device("cuda", 0))) == gpu


def test_a_warning_is_told_once(monkeypatch):
    monkeypatch.setattr(_triton, "_warned", set())
    with pytest.warns(UserWarning, match="slower"):
        warn_once("slower")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_once("slower")
