"""Training on several ranks: each has its own images, and gradients are averaged over them.

    ddp    every rank keeps all weights and both moments of each
    fsdp   every rank keeps a part of each; the weights of a block are put together while it is
           computed, forward and backward, and its gradients go to the ranks whose parts they are of

Both are torch's: DistributedDataParallel and `fully_shard` (FSDP2). Whoever looks at a model that
is trained so (evaluation, pictures, whoever gets the finished one) is given `plain`: all of it, as
one process has it, without hooks, for ranks may call it a different number of times.

DDP's `static_graph` is left alone. It gives the same numbers where each step is one micro-batch,
and saves nothing, for no search for unused parameters is made; where a step is several, torch 2.11
ends at an assertion of its own (reducer.cpp, `expect_autograd_hooks_`), compiled or not.
"""

import contextlib
import copy
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from beit_fast.flags import flag
from beit_fast.train.batch_norm import GatheredBatchNorm
from beit_fast.train.config import OptimConfig, RunConfig
from beit_fast.train.progress import waiting_for_ranks
from beit_fast.train.world import World


def check_parallel(run: RunConfig, optim: OptimConfig, world: World) -> None:
    """Raise ValueError for what several ranks cannot do together."""
    if world.size == 1:
        return
    if run.compile == "reduce-overhead":
        raise ValueError(
            f"{flag('run.compile')} reduce-overhead makes CUDA graphs, which keep gradients where "
            f"the exchange between {world.size} processes does not look for them: pass "
            f"{flag('run.compile')} default"
        )
    if run.parallel == "fsdp" and optim.backend == "apex":
        raise ValueError(
            f"{flag('optim.backend')} is apex, whose kernels know no weights in parts, and "
            f"{flag('run.parallel')} is fsdp: pass {flag('optim.backend')} torch, or "
            f"{flag('run.parallel')} ddp"
        )


def begin_alike(model: nn.Module, world: World) -> None:
    """Give every rank the weights and buffers of rank 0: what a task makes of its own images, as
    codes that start as clusters, differs from rank to rank."""
    if world.size == 1:
        return
    with torch.no_grad(), waiting_for_ranks():
        for tensor in model.state_dict().values():
            value = tensor.contiguous()
            dist.broadcast(value, src=0)
            tensor.copy_(value)


class Replicas:
    """Every rank has the whole model; one process is a rank of one."""

    by_block = False  # what torch.compile makes: the whole loss

    def __init__(self, run: RunConfig, world: World) -> None:
        self._run, self._world = run, world

    def wrap(self, module: nn.Module, blocks: Sequence[nn.Module] = ()) -> nn.Module:
        """`module`, or its DDP wrapper where there are several ranks.

        What `module` compiles for itself overlaps with the exchange all the same: inside DDP's
        forward Dynamo splits a graph at the buckets, so one is sent while the backward of the next
        part runs.
        """
        world = self._world
        if world.size == 1:
            return module
        wrapped = nn.parallel.DistributedDataParallel(
            module,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
            init_sync=False,  # `begin_alike` has done it, before averages were made of them
            gradient_as_bucket_view=True,
        )
        if self._run.gradient_dtype == "bf16":
            wrapped.register_comm_hook(state=None, hook=bf16_compress_hook)
        return wrapped

    def share(self, model: nn.Module) -> None:
        """Keep a model that is not trained, an average, as those that are: whole."""

    def plain(self, model: nn.Module) -> nn.Module:
        return model


class Shards:
    """Every rank has a part of each weight; `model` is the trained one, still whole."""

    by_block = True  # the forward of each block: gathering its weights is no part of a graph

    def __init__(self, run: RunConfig, world: World, model: nn.Module) -> None:
        reduce = torch.bfloat16 if run.gradient_dtype == "bf16" else None
        # Weights are gathered in fp32, and rounded by autocast as on one process.
        self._policy = MixedPrecisionPolicy(reduce_dtype=reduce)
        self._mesh = init_device_mesh(world.device.type, (world.size,))
        self._without_values = _without_values(model)

    def wrap(self, module: nn.Module, blocks: Sequence[nn.Module] = ()) -> nn.Module:
        """`module` in parts: its `blocks` one by one, what is left as one."""
        _make_contiguous(module)
        for part in (*blocks, module):
            fully_shard(part, mesh=self._mesh, mp_policy=self._policy)
        return module

    def share(self, model: nn.Module) -> None:
        """Keep a model that is not trained, an average, in parts too."""
        _make_contiguous(model)
        fully_shard(model, mesh=self._mesh)

    def plain(self, model: nn.Module) -> nn.Module:
        """A whole one with the weights of now. On every rank: each gives its parts."""
        values = {}
        for name, value in model.state_dict().items():
            of_all = whole(value)
            values[name] = value.clone() if of_all is value else of_all
        made = copy.deepcopy(self._without_values)
        made.load_state_dict(values, assign=True)
        return made.train(model.training)


def parallel(run: RunConfig, world: World, model: nn.Module) -> Replicas | Shards:
    """How these ranks share the training of `model`; one process shares with nobody."""
    if world.size > 1 and run.parallel == "fsdp":
        return Shards(run, world, model)
    return Replicas(run, world)


def compile_blocks(blocks: Iterable[nn.Module], mode: str) -> None:
    """Have torch.compile make each block's forward, in place: hooks and names stay as they are.

    Blocks that are the same but for their weights share a graph.
    """
    blocks = list(blocks)
    # Blocks that draw drop path themselves have a graph each, for the rate is a number in it, the
    # last one may have another; torch stops at eight graphs of one function.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, mode=mode)


def gradient_sync(module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
    """Exchange gradients on the last micro-batch of a step only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, nn.parallel.DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def forward_exchanges(module: nn.Module) -> bool:
    """Whether ranks wait for each other in the forward pass already: for the weights of a block,
    or the statistics of a batch."""
    normed = (nn.SyncBatchNorm, GatheredBatchNorm)
    return isinstance(module, FSDPModule) or any(isinstance(m, normed) for m in module.modules())


def whole(tensor: Tensor) -> Tensor:
    """Of parts, what they are parts of: on every rank, for each gives its own, and in the same
    order on all. Any other tensor is itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with waiting_for_ranks():
        return tensor.detach().full_tensor()


def own_part(tensor: Tensor) -> Tensor:
    """What this rank keeps of it, the memory itself."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def part_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Of a whole value, which every rank has, what this rank keeps of such a parameter."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _without_values(model: nn.Module) -> nn.Module:
    """A copy whose parameters take no memory."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo=empty)


def _make_contiguous(model: nn.Module) -> None:
    """`fully_shard` takes no channels-last weights; convolutions turn them at each call."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
