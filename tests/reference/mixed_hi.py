"""Mixed^Hi in the plainest torch: a model in 16 bits, float32 masters beside it, k optimizers over the masters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def round_ties_away(master: Tensor) -> Tensor:
    """float32 to bfloat16, to the nearest, and away from zero from right between two."""
    nearest = master.to(torch.bfloat16)
    is_tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    towards_zero = nearest.float().abs() < master.abs()
    further = torch.where(is_tie & towards_zero, nearest.view(torch.int16) + 1, nearest.view(torch.int16))
    return further.view(torch.bfloat16)


def train_mixed_hi(
    model: nn.Module,
    groups: Sequence[Sequence[str]],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    windows: Sequence[Sequence[Tensor]],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    *,
    dtype: torch.dtype = torch.bfloat16,
    clip_norm: float | None = None,
    always_active: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Train the float32 ``model``, which ends in ``dtype``; returns its masters."""
    masters = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    model.to(dtype)
    named = dict(model.named_parameters())

    def write(name: str) -> None:
        value = masters[name].detach()
        named[name].data.copy_(round_ties_away(value) if dtype == torch.bfloat16 else value)

    for name in named:
        write(name)
    optimizers = [make_optimizer([masters[name] for name in group]) for group in groups]
    fixed = make_optimizer([masters[name] for name in always_active]) if always_active else None
    for step, window in enumerate(windows):
        active = [*groups[step % len(groups)], *always_active]
        model.zero_grad()
        for batch in window:
            (loss_of(model, batch) / len(window)).backward()
        for name in active:
            gradient = named[name].grad
            masters[name].grad = None if gradient is None else gradient.float()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([masters[name] for name in active], clip_norm)
        for optimizer in [optimizers[step % len(groups)], *([fixed] if fixed else [])]:
            optimizer.step()
        for name in active:
            write(name)
    return {name: master.detach() for name, master in masters.items()}
