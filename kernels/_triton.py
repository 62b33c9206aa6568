"""What all launchers share: is Triton there, which GPU is it for, and one door for every launch.

`launch` is that door: it skips empty grids, launches on the tensors' device, and inside `record`
keeps the launch instead of running it. `bench/machine_code.py` records launches made with meta
tensors for a GPU that is not there (`pretend`), so what it compiles is what production launches.
"""

import contextlib
import os
import re
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:

    class _NoTriton:
        """Takes Triton's place where it has no wheel: kernels are defined and never launched."""

        constexpr = object

        def jit(self, function):
            return function

    triton = tl = _NoTriton()

HAS_TRITON = hasattr(triton, "compile")
TensorDescriptor = None
_COMPILE_ERRORS: tuple[type[Exception], ...] = (subprocess.CalledProcessError,)  # of gcc, ptxas
if HAS_TRITON:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401  for launchers

    _COMPILE_ERRORS += (CompilationError, OutOfResources, PTXASError)
# What Triton raises as a RuntimeError before anything is launched.
_COMPILE_MESSAGES = re.compile(
    r"PassManager::run failed|C compiler|ptxas|is not a recognized processor|libcuda"
)


@dataclass(frozen=True)
class Gpu:
    """What a launcher needs to know of a GPU: architecture, multiprocessors, memories in bytes."""

    capability: tuple[int, int]
    num_sms: int
    l2_bytes: int
    shared_bytes: int = 99 << 10  # most of a CTA; no GPU of capability 8.0 and newer has less

    @property
    def multiplies_from_shared(self) -> bool:
        """Whether products read shared memory (wgmma, tcgen05) and not registers (mma)."""
        return self.capability[0] in (9, 10)


A100 = Gpu((8, 0), 108, 40 << 20, 163 << 10)
RTX3090 = Gpu((8, 6), 82, 6 << 20)
RTX4090 = Gpu((8, 9), 128, 72 << 20)
H100 = Gpu((9, 0), 132, 50 << 20, 227 << 10)  # an H200 is the same with more memory
B200 = Gpu((10, 0), 148, 126 << 20, 227 << 10)
RTX5090 = Gpu((12, 0), 170, 96 << 20)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its grid, its arguments by name, and Triton's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


class KernelError(ValueError):
    """A kernel that cannot be compiled for a device: it was not launched, and wrote nothing."""

    def __init__(self, kernel: str, device: torch.device, error: Exception) -> None:
        on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        said = getattr(error, "error_message", None) or str(error)
        said = " ".join(said.split())
        said = said if len(said) <= 200 else f"{said[:197]}..."
        super().__init__(
            f"its kernel {kernel} does not compile for {on} ({type(error).__name__}: {said}); "
            "another version of Triton or of the driver may do it"
        )


TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_warned: set[str] = set()
_failed: dict[str, str] = {}  # operator -> why its kernels are not tried again in this process
_pretended: list[Gpu] = []
_recorded: list[list[Launch]] = []


@contextlib.contextmanager
def pretend(gpu: Gpu) -> Iterator[None]:
    """Choose and launch kernels as on `gpu`, for the interpreter and for `record`."""
    _pretended.append(gpu)
    try:
        yield
    finally:
        _pretended.pop()


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Keep launches instead of running them; outputs stay unwritten. For meta tensors."""
    _recorded.append([])
    try:
        yield _recorded[-1]
    finally:
        _recorded.pop()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


def exporting() -> bool:
    """Whether `torch.export` is at work, not strictly (its default, and that of ONNX).

    A program then holds torch's own operators alone: it loads where this package is not, compiles
    ahead of time and translates. Dynamo says that it exports whenever it compiles.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def can_launch(tensor: Tensor) -> bool:
    """Whether a kernel can run on this tensor: on CUDA, interpreted, or recorded."""
    if not HAS_TRITON:
        return False
    return tensor.device.type == "cuda" or interpreting() or bool(_recorded)


def gpu_of(tensor: Tensor) -> Gpu:
    """The GPU that a launch on this tensor is for; a Hopper GPU where there is none."""
    if _pretended:
        return _pretended[-1]
    if tensor.device.type != "cuda":
        return H100
    found = torch.cuda.get_device_properties(tensor.device)
    return Gpu(
        (found.major, found.minor),
        found.multi_processor_count,
        found.L2_cache_size,
        found.shared_memory_per_block_optin,
    )


def launch_obstacle(tensor: Tensor, *dtypes: torch.dtype, operator: str = "") -> str | None:
    """Why no kernel of the operator can take tensors like this one, of these dtypes, or None."""
    if operator in _failed:
        return _failed[operator]
    if not can_launch(tensor):
        return f"Triton has no kernels for {tensor.device.type} tensors"
    for dtype in dtypes:
        if dtype not in TRITON_DTYPES:
            return f"the kernels take bfloat16, float16 and float32, not {dtype}"
    capability = _capability_of(tensor)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0, this GPU has {capability}"
    return None


def warn_once(message: str, stacklevel: int = 4) -> None:
    """A fallback is never silent, and not told at every step either."""
    if message not in _warned:
        warnings.warn(message, stacklevel=stacklevel)
        _warned.add(message)  # and not of one that is an error: that ends every call


def _capability_of(tensor: Tensor) -> tuple[int, int]:
    # Not by `gpu_of`: torch.compile traces this.
    if _pretended or tensor.device.type != "cuda":
        return gpu_of(tensor).capability
    found = torch.cuda.get_device_properties(tensor.device)
    return found.major, found.minor


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    on: Tensor,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int | None = None,
    fuses: bool = True,
    **arguments: Any,
) -> None:
    """kernel[grid](**arguments) on the device of `on`; an empty grid launches nothing.

    `maxnreg` caps the registers of a thread, for more CTAs on a multiprocessor. Without `fuses`
    products and sums of floats are rounded one by one, as the text of the kernel has them. Raises
    KernelError where the kernel cannot be compiled.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    if not fuses:
        options["enable_fp_fusion"] = False
    if 0 in grid:
        return
    if _recorded:
        _recorded[-1].append(Launch(kernel, grid, arguments, options))
        return
    guard = torch.cuda.device(on.device) if on.device.type == "cuda" else contextlib.nullcontext()
    with guard:
        try:
            _run(kernel, grid, arguments | options)
        except (RuntimeError, *_COMPILE_ERRORS) as error:
            if isinstance(error, _COMPILE_ERRORS) or _COMPILE_MESSAGES.search(str(error)):
                raise KernelError(kernel.__name__, on.device, error) from error
            raise  # what is wrong on the device, or with the arguments, no other path would mend


def _run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    kernel[grid](**arguments)


def contiguous_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor with elements of a row side by side, as kernels read it; a copy if need be."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def cdiv(number: int, by: int) -> int:
    return -(-number // by)
