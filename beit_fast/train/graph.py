"""A step as a CUDA graph: one launch instead of hundreds, and no Python between kernels.

The whole step is one graph; what prepares its batches, the tokenizer above all, is another.

The first calls run as they always do and are real steps: kernels are compiled, libraries choose
their algorithms, the optimiser allocates its moments. The next call is captured, and from then on
batches are copied into the buffers that the graph reads, and the graph is replayed. Random numbers
come from torch's generator, whose seed and offset a replay reads anew: a step gives the numbers
it would give without the graph.

Source: PyTorch's notes on CUDA graphs, "whole-network capture"
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from beit_fast.errors import RunError
from beit_fast.flags import flag
from beit_fast.train.config import RunConfig
from beit_fast.train.prefetch import Batch
from beit_fast.train.step import TrainStep, autocast
from beit_fast.train.task import Task
from beit_fast.train.world import World

EAGER_STEPS = 3  # before the capture, as PyTorch's notes have it
logger = logging.getLogger("beit_fast.train")


class CaptureError(RunError):
    """Something could not be captured in a CUDA graph. Nothing may run on the GPU after it.

    torch 2.11 ends a failed capture before it has put back the generator ("Offset increment outside
    graph capture" at the next random number), the current stream and the allocator's pool; what it
    has for that is private (mended later: pytorch pull requests 180395 and 190348).
    """

    def __init__(self, name: str, cause: Exception) -> None:
        why = str(cause).partition("\n")[0]
        remedy = f"pass {flag('run.cuda_graph')} false, and the run resumes from its checkpoint"
        # By the words: the driver's own error, as a graph is made executable, has no type for it.
        if "out of memory" in why:
            why = f"it keeps memory of its own there, and too little was free ({why})"
            remedy += f". A new run with a smaller {flag('data.batch_size')} needs less"
        super().__init__(
            f"{name} cannot be captured in a CUDA graph: {why}. torch 2.11 leaves the random "
            "generator, the stream and the allocator unusable after a failed capture, so this "
            f"process cannot go on: {remedy}"
        )


def check_graphs(device: torch.device) -> None:
    """Raise ValueError for a device without CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(
            f"run.cuda_graph is true and the device is {device.type}: CUDA graphs need a GPU; pass "
            f"{flag('run.cuda_graph')} false"
        )


def preparation(task: Task, run: RunConfig, device: torch.device) -> Callable[[Batch], Batch]:
    """`task.prepare` in the run's precision, and as a CUDA graph where the run has them."""
    prepare = autocast(run, device)(task.prepare)
    if not run.cuda_graph:
        return prepare
    name = "the preparation of batches"
    graph = Graphed(lambda batches: prepare(batches[0]), device, name, draws=False)
    return lambda batch: graph([batch])


def graphed(step: TrainStep, run: RunConfig, world: World) -> "TrainStep | Graphed":
    """The step, as a CUDA graph where the run has them and it is this process's alone."""
    if not run.cuda_graph:
        return step
    if world.size > 1:
        logger.warning(
            "%s: the steps run without a graph, for gradients are exchanged between %d processes. "
            "To capture that, PyTorch wants NCCL's error handling off, and then a process that "
            "dies leaves the others waiting for ever",
            flag("run.cuda_graph"),
            world.size,
        )
        return step
    return Graphed(step, world.device, "the step")


class Graphed:
    """A function of batches that is captured after EAGER_STEPS calls and replayed from then on.

    `name` is what errors call it. `draws` says whether it draws random numbers: where it does not,
    its replays leave torch's generator alone, and may run beside another graph's. Raises ValueError
    for a device without CUDA graphs, and for batches of other shapes than the captured ones;
    CaptureError where the function cannot be captured.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Batch]], Batch],
        device: torch.device,
        name: str,
        *,
        draws: bool = True,
    ) -> None:
        check_graphs(device)
        self._function, self._device, self._name, self._draws = function, device, name, draws
        # One for all calls: the allocator keeps memory for each stream. And its own: cuBLAS has a
        # workspace for each stream, which the graphs captured on it share, and two may run at once.
        self._side = torch.cuda.Stream(device)
        self._num_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Batch] = []
        self._outputs: Batch = {}

    def __call__(self, batches: Sequence[Batch]) -> Batch:
        self._num_calls += 1
        if self._num_calls <= EAGER_STEPS:
            return self._beside(batches)
        if self._graph is None:
            self._graph = self._capture(batches)
        self._fill(batches)
        self._graph.replay()
        # The graph owns its outputs, and the next replay writes them again.
        return {name: value.clone() for name, value in self._outputs.items()}

    def _beside(self, batches: Sequence[Batch]) -> Batch:
        """A call without the graph, on a stream of its own as a capture will be."""
        here = torch.cuda.current_stream(self._device)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            outputs = self._function(batches)
        here.wait_stream(self._side)
        for tensor in outputs.values():
            tensor.record_stream(here)
        return outputs

    def _capture(self, batches: Sequence[Batch]) -> torch.cuda.CUDAGraph:
        self._inputs = [{name: value.clone() for name, value in batch.items()} for batch in batches]
        graph, cause = torch.cuda.CUDAGraph(), None
        generator = contextlib.nullcontext() if self._draws else _generator_apart(self._device)
        # Other threads (the loader's, pinning memory) may use CUDA meanwhile.
        capture = torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local")
        try:
            with generator, capture:
                try:
                    self._outputs = self._function(self._inputs)
                except Exception as error:
                    cause = error  # the end of the capture raises an error of its own over it
                    raise
        except RuntimeError as error:
            cause = cause or error
            raise CaptureError(self._name, cause) from cause
        return graph

    def _fill(self, batches: Sequence[Batch]) -> None:
        theirs, ours = ([_shapes(b) for b in bs] for bs in (batches, self._inputs))
        if theirs != ours:
            raise ValueError(
                f"the graph was captured for batches {ours} and got {theirs}: keep shapes fixed, "
                f"or pass {flag('run.cuda_graph')} false"
            )
        for buffers, batch in zip(self._inputs, batches, strict=True):
            for name, buffer in buffers.items():
                buffer.copy_(batch[name])


@contextlib.contextmanager
def _generator_apart(device: torch.device) -> Iterator[None]:
    """A state of its own for torch's generator, for as long as something is captured.

    Each replay writes seed and offset of the states that its graph was captured with into device
    memory, there once for all graphs of a state: a graph that runs beside another would change the
    numbers that the other is about to draw.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    generator = torch.cuda.default_generators[index]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(state.clone_state())  # the graph keeps the clone
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)


def _shapes(batch: Batch) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
