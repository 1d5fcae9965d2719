"""Which optimizers can train one layer group at a time, and why the others cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hift.engine.optimizer_twin import twin_of
from lightning_hift.engine.stepped_options import SteppedOptions

_REFUSED = {
    torch.optim.LBFGS: "it steps on one flat vector of all parameters and reruns its closure",
    torch.optim.SparseAdam: "it takes sparse gradients only, which layer groups of dense parameters do not have",
}
_REMEDY = "Use an optimizer that keeps its state by parameter, such as torch.optim.AdamW."


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state cannot be taken apart by parameter.

    Raises:
        TypeError: As said.
    """
    for kind, reason in _REFUSED.items():
        if isinstance(optimizer, kind):
            _refuse(kind, reason)
    own = list(vars(optimizer).values())
    own += [value for table in own if isinstance(table, dict) for value in table.values()]
    inner = next((value for value in own if isinstance(value, Optimizer)), None)
    if inner is not None and not (
        inner.state is getattr(optimizer, "state", None) and inner.param_groups is optimizer.param_groups
    ):
        _refuse(type(optimizer), f"it wraps {type(inner).__name__}, which holds the state and steps by itself")
    if getattr(optimizer, "is_paged", False):
        _refuse(type(optimizer), "it pages its state in and out by itself, which offload='host' does already")
    if optimizer.defaults.get("gradient_release"):
        _refuse(type(optimizer), "with gradient_release it steps during the backward pass")


def check_resettable(optimizer: Optimizer) -> None:
    """Refuse to drop state that a new turn cannot do without.

    Raises:
        TypeError: As said.
    """
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise TypeError(
            f"{type(optimizer).__name__} keeps an average of the weights over the whole run in its state, which"
            " state_handling='reset' would drop. Use state_handling='keep', or an optimizer without train() and eval()."
        )
    if not getattr(optimizer, "needs_gradient", True):
        raise TypeError(
            f"{type(optimizer).__name__} draws its noise by the steps that it counts in its state; with"
            " state_handling='reset' each turn of a group would draw the same noise again. Use state_handling='keep'."
        )


def check_divisible(optimizer: Optimizer) -> None:
    """Refuse an optimizer of which several processes could not each step a part, found out by a few steps on the CPU.

    Raises:
        TypeError: As said.
    """
    kind = type(optimizer).__name__
    remedy = "Leave partition_state out, or use an optimizer that steps each by itself, such as torch.optim.AdamW."
    if not getattr(optimizer, "needs_gradient", True) or callable(getattr(optimizer, "eval", None)):
        raise TypeError(
            f"{kind} moves weights outside of its steps, so its state cannot be divided among processes. {remedy}"
        )
    for options in optimizer.param_groups:
        try:
            reason = _depends_on_others(optimizer, options)
        except Exception as error:  # anything may happen in a foreign optimizer
            reason = f"could not be tried out on the CPU ({type(error).__name__}: {error})"
        if reason is not None:
            raise TypeError(f"{kind} {reason}, so its state cannot be divided among processes. {remedy}")


def _depends_on_others(optimizer: Optimizer, options: dict[str, Any]) -> str | None:
    """How the step of a parameter depends on whether others are stepped with it; ``None``: it does not."""
    generator = torch.Generator().manual_seed(0)
    together = [nn.Parameter(torch.randn(64, 64, generator=generator)) for _ in range(2)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    one, *several = (twin_of(optimizer, options, parameters) for parameters in (together, alone[:1], alone[1:]))
    counters = SteppedOptions(one)
    for _ in range(5):
        for p, other in zip(together, alone, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            other.grad = p.grad.clone()
        counters.enter("the only one")
        for twin in (one, *several):
            twin.step()
        counters.leave("the only one")
    if changed := [key for _, key, *_ in counters.state_dict()]:
        return f"keeps {', '.join(changed)} in its param_groups, which count for all parameters"
    if not all(torch.equal(p, other) for p, other in zip(together, alone, strict=True)):
        return "does not compute the same for a parameter alone as beside others"
    one.param_groups = []  # a process may have nothing to step
    one.step()
    return None


def counts_of(optimizer: Optimizer) -> dict[str, Any]:
    """Numbers that the optimizer keeps as attributes of its own, by name."""
    return {key: value for key, value in vars(optimizer).items() if type(value) in (int, float)}


def check_counts(optimizer: Optimizer, before: dict[str, Any]) -> None:
    """Refuse an optimizer whose step has changed such a number: it can belong to no parameter and no group.

    Raises:
        TypeError: As said.
    """
    changed = [key for key, value in counts_of(optimizer).items() if before.get(key) != value]
    if changed:
        _refuse(
            type(optimizer), f"its step changes its attributes {', '.join(changed)}, which count for all parameters"
        )


def _refuse(kind: type[Optimizer], reason: str) -> None:
    raise TypeError(f"{kind.__name__} cannot train one layer group at a time: {reason}. {_REMEDY}")
