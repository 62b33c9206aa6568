"""What frozen features know of labels: k nearest neighbours, and linear classifiers.

Numbers in, accuracies out: nothing here knows of models or files. Letters: S layers, F values of a
feature, C classes, R learning rates, n images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.train.stop import heed_stop

TEMPERATURE = 0.07  # of a neighbour's vote, as in DINO (arXiv:2104.14294, section 4.1)
QUERIES, BANK = 512, 16384  # similarities at once: 32 MiB


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    ks: Sequence[int],
) -> dict[int, float]:
    """Share of the queries that their k nearest neighbours name right, for every k.

    bank (n, F) and queries (m, F), any scale; labels int64. A neighbour votes for its class with
    exp(cosine / 0.07), DINO's weights. Exact; of equally near ones the first in the bank counts, of
    equal votes the smallest label. Raises ValueError for no queries, or a k the bank is too small
    for.
    """
    if not ks or min(ks) < 1 or max(ks) > len(bank):
        raise ValueError(f"k of {list(ks)} neighbours among {len(bank)}: pass 1 to {len(bank)}")
    if len(queries) == 0:
        raise ValueError("there are no images to classify: pass at least one")
    bank = F.normalize(bank.float(), dim=1)
    num_classes = int(torch.cat([bank_labels, labels]).max()) + 1
    correct = dict.fromkeys(ks, 0)
    for start in range(0, len(queries), QUERIES):
        part = F.normalize(queries[start : start + QUERIES].float(), dim=1)
        cosine, nearest = _nearest(part, bank, max(ks))
        truth = labels[start : start + QUERIES]
        rows = torch.arange(len(part), device=part.device)
        votes = part.new_zeros(len(part), num_classes, dtype=torch.float64)
        # One neighbour of every query at a time: no two add to one vote, and all k come in passing.
        for rank in range(max(ks)):
            weight = torch.exp((cosine[:, rank].double() - 1) / TEMPERATURE)
            votes[rows, bank_labels[nearest[:, rank]]] += weight
            if rank + 1 in correct:
                correct[rank + 1] += int((votes.argmax(1) == truth).sum())
    return {k: count / len(queries) for k, count in correct.items()}


def _nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and indices (m, k), nearest first and then in the bank's order."""
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), BANK):
        cosine = queries @ bank[start : start + BANK].T
        here = torch.arange(start, start + cosine.shape[1], device=queries.device)
        cosine = torch.cat([best, cosine], dim=1)
        index = torch.cat([index, here.expand(len(queries), -1)], dim=1)
        best, order = cosine.sort(dim=1, descending=True, stable=True)
        best, index = best[:, :k], index.gather(1, order[:, :k])
    return best, index


@dataclass(frozen=True)
class LinearProbes:
    """Trained classifiers: weight (R, S, F, C), bias (R, S, C) for the learning rates `rates`."""

    rates: tuple[float, ...]
    weight: Tensor
    bias: Tensor

    @torch.no_grad()
    def accuracy(self, features: np.ndarray, labels: Tensor, batch_size: int = 1024) -> Tensor:
        """Share named right, float64 (R, S), of features (n, S, F). Raises ValueError for none."""
        if len(features) == 0:
            raise ValueError("there are no images to classify: pass at least one")
        device = self.weight.device
        correct = torch.zeros(self.weight.shape[:2], dtype=torch.int64, device=device)
        for start in range(0, len(features), batch_size):
            rows = np.arange(start, min(start + batch_size, len(features)))
            logits_RSBC = _logits(_rows(features, rows, device), self.weight, self.bias)
            correct += (logits_RSBC.argmax(-1) == labels[rows].to(device)).sum(-1)
        return correct.cpu().double() / len(features)


def linear_probes(
    features: np.ndarray,
    labels: Tensor,
    num_classes: int,
    *,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    weight_decay: float = 1e-4,
    rows: np.ndarray | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LinearProbes:
    """Train a classifier for every layer and learning rate in the same passes over the data.

    features (n, S, F), an array or memory map, not normalised; labels int64 (n,); `rows` those to
    train on, else all. Weights start from N(0, 0.01), the same for every rate, biases from 0;
    AdamW; the cosine schedule goes to 0 and steps by the epoch (unilm's run_linear_eval.py).
    Classifiers share batches and nothing else: the loss is a sum, and AdamW works on each value
    alone.
    """
    rows = np.arange(len(features)) if rows is None else rows
    if len(rows) == 0 or not rates:
        raise ValueError(f"{len(rows)} images and {len(rates)} learning rates: pass at least one")
    S, D = features.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    start = 0.01 * torch.randn(S, D, num_classes, generator=generator)
    weights = [start.to(device, copy=True).requires_grad_() for _ in rates]
    biases = [torch.zeros(S, num_classes, device=device, requires_grad=True) for _ in rates]
    optimizer = torch.optim.AdamW(
        [{"params": pair, "lr": lr} for *pair, lr in zip(weights, biases, rates, strict=True)],
        weight_decay=weight_decay,
    )
    for epoch in range(epochs):
        heed_stop("while probes were trained")
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        order = rows[torch.randperm(len(rows), generator=generator).numpy()]
        for first in range(0, len(order), batch_size):
            batch = np.sort(order[first : first + batch_size])  # memory maps like order
            x_BSF, y_B = _rows(features, batch, device), labels[batch].to(device)
            logits_RSBC = _logits(x_BSF, torch.stack(weights), torch.stack(biases))
            target = y_B.expand(logits_RSBC.shape[:-1])
            loss = F.cross_entropy(logits_RSBC.flatten(0, 2), target.flatten(), reduction="sum")
            optimizer.zero_grad()
            (loss / len(batch)).backward()
            optimizer.step()
    return LinearProbes(tuple(rates), torch.stack(weights).detach(), torch.stack(biases).detach())


def _rows(features: np.ndarray, rows: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.asarray(features[rows], dtype=np.float32)).to(device)


def _logits(x_BSF: Tensor, weight_RSFC: Tensor, bias_RSC: Tensor) -> Tensor:
    return x_BSF.transpose(0, 1) @ weight_RSFC + bias_RSC[:, :, None]
