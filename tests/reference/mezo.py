"""MeZO in the plainest torch: noise is drawn once and kept, weights are copied, and nothing is done in place."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def mezo_steps(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    steps: int,
    *,
    lr: float,
    eps: float,
    weight_decay: float = 0.0,
    sparsity: float = 0.0,
    seed: int = 0,
    first_step: int = 0,
) -> list[Tensor]:
    """Step ``parameters`` and return the losses of the ``+eps`` sides."""
    found = []
    for step in range(first_step, first_step + steps):
        noise = []
        for index, p in enumerate(parameters):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {step} {index}".encode()))
            noise.append(torch.randn(p.shape, generator=generator) * _mask(p, sparsity))
        start = [p.detach().clone() for p in parameters]
        # By alpha, as the product is then not rounded before the sum.
        plus = [torch.add(p, z, alpha=eps) for p, z in zip(start, noise, strict=True)]
        minus = [torch.add(p, z, alpha=-2 * eps) for p, z in zip(plus, noise, strict=True)]
        again = [torch.add(p, z, alpha=eps) for p, z in zip(minus, noise, strict=True)]
        with torch.no_grad():
            losses = [_at(parameters, place, loss) for place in (plus, minus)]
            slope = (losses[0] - losses[1]) / (2 * eps)
            for p, value, z, before in zip(parameters, again, noise, start, strict=True):
                decay = lr * weight_decay * (_mask(before, sparsity) if sparsity else 1)
                p.copy_(value * (1 - decay) - z * (lr * slope))
        found.append(losses[0])
    return found


def _at(parameters: Sequence[nn.Parameter], values: Sequence[Tensor], loss: Callable[[], Tensor]) -> Tensor:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
    return loss()


def _mask(p: Tensor, sparsity: float) -> Tensor:
    """1 where a weight is among the smaller ones of its tensor."""
    ranked = p.detach().abs().flatten().sort().values
    kept = p.numel() - math.floor(sparsity * p.numel())
    return (p.detach().abs() <= ranked[kept - 1]).float()
