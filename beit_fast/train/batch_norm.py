"""Batch norm over the batches of all ranks, so that two ranks learn what one with both does.

    mean, var of a channel over (ranks, batch, height, width)
    out = (x - mean) / sqrt(var + eps) * weight + bias

torch has it for GPUs, and refuses a CPU's tensors. `GatheredBatchNorm` is the same for these: each
rank tells the others its count, mean and sum of squared differences, and all merge them in the
order of the ranks, so that their buffers are the same to the last bit. Parameters and buffers have
batch norm's names: a checkpoint does not show how many ranks there were.

Source: torch's `nn.SyncBatchNorm`; merging: Chan, Golub and LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances", 1979
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit_fast.train.world import World


def synchronize_batch_norm(model: nn.Module, world: World) -> nn.Module:
    """`model` with each `BatchNorm2d` in it over all ranks; with one rank as it is.

    Parameters and buffers stay the same tensors, under the same names.
    """
    if world.size == 1:
        return model
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, GatheredBatchNorm.of(module))
    return model


class GatheredBatchNorm(nn.BatchNorm2d):
    """Batch norm of (B, C, height, width) over all ranks of the default group, on their CPUs.

    In eval mode it is batch norm.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "GatheredBatchNorm":
        """Made of `norm`, with its tensors."""
        ours = cls(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        ours.weight, ours.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(ours, name, buffer)
        return ours.train(norm.training)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        x = images.to(self.weight.dtype)  # statistics are of autocast's values, and not in bf16
        var_C, mean_C = torch.var_mean(x, (0, 2, 3), correction=0)
        count_C = torch.full_like(mean_C, x.numel() // x.shape[1])
        parts = _Gather.apply(torch.stack([count_C, mean_C, var_C * count_C]))
        count_C, mean_C, squares_C = _merged(parts)
        self._track(mean_C.detach(), squares_C.detach() / (count_C - 1))
        scale_C = (squares_C / count_C + self.eps).rsqrt() * self.weight
        out = (x - _wide(mean_C)) * _wide(scale_C) + _wide(self.bias)
        return out.to(images.dtype)

    @torch.no_grad()
    def _track(self, mean_C: Tensor, var_C: Tensor) -> None:
        """As batch norm does; the running variance is the unbiased one."""
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(var_C, self.momentum)


class _Gather(torch.autograd.Function):
    """A tensor of this rank to those of all, (ranks, ...); its gradient comes from all losses."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _gathered(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _ShareOfRank.apply(gradient)


class _ShareOfRank(torch.autograd.Function):
    """What all ranks' (ranks, ...) have for this one, added up: the adjoint of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return _gathered(value)[:, rank].sum(dim=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Gather.apply(gradient)


def _gathered(value: Tensor) -> Tensor:
    """Of all ranks; a process without a group is the only one."""
    if not dist.is_initialized():
        return value[None].clone()
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.contiguous())
    return torch.stack(values)


def _merged(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared differences (C,) of all, from (ranks, 3, C)."""
    count, mean, squares = parts[0]
    for more, other, others in parts[1:]:
        total, apart = count + more, other - mean
        mean = mean + apart * (more / total)
        squares = squares + others + apart.square() * (count * more / total)
        count = total
    return count, mean, squares


def _wide(value_C: Tensor) -> Tensor:
    return value_C.view(1, -1, 1, 1)
