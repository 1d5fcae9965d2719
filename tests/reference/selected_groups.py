"""Selection policies in the plainest torch: an optimizer for each group, made anew where the state is reset."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer


def train_selected(
    model: nn.Module,
    groups: Sequence[Sequence[str]],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    windows: Sequence[Sequence[Tensor]],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    select: Callable[[int], Sequence[int]],
    *,
    always_active: Sequence[str] = (),
    reset: bool = False,
    observe: Callable[[int, Tensor], None] = lambda step, loss: None,
) -> None:
    """Train ``model`` in place; ``windows[t]`` are the micro-batches of optimizer step t."""
    named = dict(model.named_parameters())
    fixed = [make_optimizer([named[name] for name in always_active])] if always_active else []
    optimizers: dict[int, Optimizer] = {}
    for step, window in enumerate(windows):
        active = select(step)
        if reset:
            optimizers = {i: optimizer for i, optimizer in optimizers.items() if i in active}
        for i in active:
            if i not in optimizers:
                optimizers[i] = make_optimizer([named[name] for name in groups[i]])
        model.zero_grad()
        for batch in window:
            loss = loss_of(model, batch) / len(window)
            observe(step, loss.detach())
            loss.backward()
        for optimizer in [*fixed, *(optimizers[i] for i in active)]:
            optimizer.step()
