"""Seeds, threads and the interpreter: every test starts from the same state, on any machine."""

import importlib
import os
import pkgutil
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Grain imports jax where jax is installed

import numpy as np
import pytest
import torch

# Before Triton is imported, which Dynamo does, which `two_devices` needs.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from machine import (  # noqa: F401  hooks of pytest
    pytest_configure,
    pytest_make_collect_report,
    pytest_report_header,
    pytest_runtest_call,
    pytest_runtest_setup,
)
from two_devices import GPU, two_devices

torch.set_num_threads(1)  # sums of two threads differ from sums of one in the last bits

# torch lists the functions that obey `with torch.device(...)` at the first use, and some tests
# replace one of them for their time.
with torch.device("cpu"):
    torch.empty(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test printed and logged may have names of files that are no text, which cannot be
    sent from one process of the tests to another."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


def _mend_interpreter() -> None:
    """Give Triton's interpreter bfloat16 as GPUs have it, and loops over run-time numbers.

    It keeps bf16 as raw 16-bit integers, multiplies those integers in `tl.dot`, and truncates
    where it converts. Arithmetic on bf16 outside `tl.dot` stays wrong: kernels convert first.
    Its scalars are arrays of one element, which NumPy deprecates as a bound of `range`.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def from_bf16(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def to_bf16(values: np.ndarray) -> np.ndarray:
        values = np.ascontiguousarray(values, dtype=np.float32)
        return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def values_of(handle: interpreter.TensorHandle) -> np.ndarray:
        return from_bf16(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data

    def convert(self, src, dst_type, rounding_mode=None):
        dst = dst_type.scalar
        eight_bits = 8 in (src.dtype.scalar.primitive_bitwidth, dst.primitive_bitwidth)
        if eight_bits and src.dtype.scalar.is_floating() and dst.is_floating():
            return fp_to_fp(self, src, dst_type, rounding_mode)
        values = values_of(src)
        if dst == tl.bfloat16:
            return interpreter.TensorHandle(to_bf16(values), dst)
        with np.errstate(over="ignore"):  # fp32 beyond fp16's range is inf there as well
            return interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(dst)), dst)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a_values, b_values = (values_of(t).astype(d.data.dtype) for t in (a, b))
        return interpreter.TensorHandle(np.matmul(a_values, b_values) + d.data, d.dtype.scalar)

    def patch_lang_tensor(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch_tensor = interpreter._patch_lang_tensor
    interpreter._patch_lang_tensor = patch_lang_tensor
    builder = interpreter.InterpreterBuilder
    fp_to_fp = builder.create_fp_to_fp
    builder.create_fp_to_fp = builder.cast_impl = convert
    builder.create_dot = dot


if os.environ.get("TRITON_INTERPRET") == "1":
    _mend_interpreter()
    # Triton reads the variable when a kernel is defined, and some tests have it off.
    path = importlib.import_module("beit_fast.kernels").__path__
    for kernels in pkgutil.walk_packages(path, "beit_fast.kernels."):
        importlib.import_module(kernels.name)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where kernels run: a GPU, or what stands for one and refuses the tensors of the CPU."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        with two_devices():
            yield GPU


@pytest.fixture(autouse=True)
def _kernels_run_on_the_device_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test without the device sees no interpreter: on a GPU machine there is none."""
    with pytest.MonkeyPatch.context() as patch:
        if "device" not in request.fixturenames:
            patch.setenv("TRITON_INTERPRET", "0")
        yield
