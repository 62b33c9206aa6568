"""A step as a CUDA graph: one launch instead of hundreds, and no Python between kernels.

The whole step is one graph; what prepares its batches, the tokenizer above all, is another.

The first calls run as they always do and are real steps: kernels are compiled, libraries choose
their algorithms, the optimiser allocates its moments. The next call is captured, and from then on
batches are copied into the buffers that the graph reads, and the graph is replayed. Random numbers
come from torch's generator, whose seed and offset a replay reads anew: a step gives the numbers
it would give without the graph.

Source: PyTorch's notes on CUDA graphs, "whole-network capture"
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Batch = dict[str, Tensor]
logger = logging.getLogger("beit_fast.train")
EAGER_STEPS = 3  # before the capture, as PyTorch's notes have it


class Graphed:
    """A function of batches that is captured after EAGER_STEPS calls and replayed from then on.

    Where it cannot be captured, one warning says why, `clean` is called, and the function goes on
    without a graph. `name` is what the warning calls it. Raises ValueError for a device without
    CUDA graphs, and for batches of other shapes than the captured ones.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Batch]], Batch],
        device: torch.device,
        name: str,
        clean: Callable[[], object] = lambda: None,
    ) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"run.cuda_graph is true and the device is {device.type}: CUDA graphs need a GPU; "
                "pass --run.cuda_graph false"
            )
        self._function, self._device, self._name, self._clean = function, device, name, clean
        self._side = torch.cuda.Stream(device)  # one: the allocator keeps memory for each stream
        self._num_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._gives_up = False
        self._inputs: list[Batch] = []
        self._outputs: Batch = {}

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def __call__(self, batches: Sequence[Batch]) -> Batch:
        if self._gives_up:
            return self._function(batches)
        self._num_calls += 1
        if self._num_calls <= EAGER_STEPS:
            return self._beside(batches)
        if self._graph is None:
            self._capture(batches)
            if self._graph is None:
                return self._function(batches)
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

    def _capture(self, batches: Sequence[Batch]) -> None:
        self._inputs = [{name: value.clone() for name, value in batch.items()} for batch in batches]
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (the loader's, pinning memory) may use CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self._function(self._inputs)
        except RuntimeError as error:
            self._gives_up = True
            self._inputs, self._outputs = [], {}
            self._clean()
            torch.cuda.synchronize(self._device)
            logger.warning(
                "%s cannot be captured in a CUDA graph and runs without one: %s",
                self._name,
                str(error).partition("\n")[0],
            )
            return
        self._graph = graph

    def _fill(self, batches: Sequence[Batch]) -> None:
        theirs, ours = ([_shapes(b) for b in bs] for bs in (batches, self._inputs))
        if theirs != ours:
            raise ValueError(
                f"the graph was captured for batches {ours} and got {theirs}: keep shapes fixed, "
                "or pass --run.cuda_graph false"
            )
        for buffers, batch in zip(self._inputs, batches, strict=True):
            for name, buffer in buffers.items():
                buffer.copy_(batch[name])


def _shapes(batch: Batch) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
