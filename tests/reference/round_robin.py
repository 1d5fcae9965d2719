"""HiFT in the plainest torch: k independent optimizers, stepped in turn, with one learning rate per sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def train_round_robin(
    model: nn.Module,
    groups: Sequence[Sequence[str]],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    windows: Sequence[Sequence[Tensor]],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    *,
    always_active: Sequence[str] = (),
    order: Callable[[int], int] | None = None,
    steps_per_group: int = 1,
    lr_at: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
    window_size: int | None = None,
) -> list[int]:
    """Train ``model`` in place; returns the group of each step.

    ``windows[t]`` are the micro-batches of optimizer step t, each loss divided by ``window_size`` (default: their
    number). ``lr_at(t)`` is the learning rate of a schedule that is not held; the sweep uses that of its first step.
    All parameters get gradients; those of inactive groups are thrown away.
    """
    named = dict(model.named_parameters())
    optimizers = [make_optimizer([named[name] for name in group]) for group in groups]
    fixed = make_optimizer([named[name] for name in always_active]) if always_active else None
    per_sweep = len(groups) * steps_per_group
    taken = []
    for step, window in enumerate(windows):
        place = step % per_sweep // steps_per_group
        group = order(place) if order else place
        taken.append(group)
        stepped = [optimizers[group]] + ([fixed] if fixed else [])
        model.zero_grad()
        for batch in window:
            (loss_of(model, batch) / (window_size or len(window))).backward()
        active = [named[name] for name in (*groups[group], *always_active)]
        for parameter in set(model.parameters()) - set(active):
            parameter.grad = None
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        for optimizer in stepped:
            if lr_at is not None:
                for options in optimizer.param_groups:
                    options["lr"] = lr_at(step - step % per_sweep)
            optimizer.step()
    return taken
