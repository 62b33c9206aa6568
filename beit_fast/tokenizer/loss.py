"""The training loss of the dVAE and the schedules of its two coefficients.

    loss = (-E[ln p(x | z)] + beta KL(q(z | x) || uniform)) / values,    values = 3 height width

Both terms are divided by the number of pixel values of an image, so the loss reads as nats per
value, and the KL of one position, which stands for 3 x 8 x 8 = 192 values, weighs beta / 192 for
any image size.

Source    Ramesh et al., arXiv:2102.12092, appendix A.2 and A.3
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.tokenizer.dvae import DvaeOutput


class DvaeLoss(NamedTuple):
    """Scalars: `total` to minimise; `reconstruction` in nats per value; `kl` in nats a position."""

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


def logit_laplace_nll(mapped: Tensor, mu: Tensor, log_scale: Tensor) -> Tensor:
    """-ln p(x) = ln 2 + ln b + ln x + ln(1 - x) + |logit(x) - mu| / b, elementwise.

    mapped: x in (0, 1), away from both ends (`map_pixels` gives [0.1, 0.9]); mu and ln b =
    log_scale of the same shape. fp32 in, fp32 out. Source: appendix A.3, equation 3.
    """
    log_jacobian = torch.log(mapped * (1 - mapped))
    error = (torch.logit(mapped) - mu).abs()
    return math.log(2) + log_scale + log_jacobian + error * torch.exp(-log_scale)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) = ln V - entropy, in nats: (B, V, h, w) -> (B, h, w)."""
    log_q = F.log_softmax(logits, dim=1)
    return (log_q.exp() * log_q).sum(dim=1) + math.log(logits.shape[1])


def dvae_loss(output: DvaeOutput, beta: float | Tensor) -> DvaeLoss:
    """Negative evidence lower bound in nats per pixel value, its KL term weighted by `beta`.

    Means over the batch; scalars stay on the device.
    """
    reconstruction = logit_laplace_nll(output.mapped, output.mu, output.log_scale).mean()
    kl = kl_to_uniform(output.logits).mean()
    positions, values = output.logits[:, 0].numel(), output.mapped.numel()
    return DvaeLoss(reconstruction + beta * kl * (positions / values), reconstruction, kl)
