"""Turns in which a layer group gets no gradient, and whether it can get one at all.

A forward pass may leave a layer out (layer dropout, a head that a batch does not need), or gradients may be dropped
because they are NaN. Then the turn passes without an update, as in plain torch. But a group that no backward pass can
reach would waste its turns for ever. So a group that never had a gradient yet when it missed its turn stays trainable
after it, until a backward pass reaches it; what that computes for it is thrown away. If none does in a whole sweep, the
run is refused. So it is where other groups' turns reach it, but its own never do: an autograd function may need an
input with a gradient, which is frozen then.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from lightning_hift.groups.grouping import LayerGroup
from lightning_hift.offload.sharded_tensors import is_sharded

_FEW = 8  # steps, in which chance alone may have left a layer out
_MANY = 16  # steps of its own, likewise

CAUSES = (
    "Either the forward pass does not use it: name it in frozen=[...]. Or activation checkpointing with"
    " use_reentrant=True cuts the graph below a frozen layer: pass use_reentrant=False. Or an autograd function of the"
    " model needs an input with a gradient (Reformer): name what is below it in always_active=['embedding']. Or the"
    " forward pass ran under torch.no_grad, or before the group was activated."
)


class MissedTurns:
    """Counts the turns of layer groups that pass without an update, and refuses groups that cannot be reached.

    A group is refused that has never had a gradient, if no backward pass reaches it in a whole sweep (at least 8 steps)
    after its first turn, or none of 16 steps of its own.

    Args:
        num_groups: How many groups there are. The only one there is may miss turns for ever, as in full fine-tuning.
        steps_per_sweep: For how many steps, at least 8, a group that never had a gradient is waited for.
    """

    def __init__(self, num_groups: int, steps_per_sweep: int) -> None:
        self.count = 0
        """Steps in which an active group had no gradient."""
        # By index, of groups that have never had one: how many of their own steps have passed without.
        self._never = dict.fromkeys(range(num_groups), 0) if num_groups > 1 else {}
        self._reached: set[int] = set()  # by a backward pass in the turn of another one
        self._patience = max(steps_per_sweep, _FEW)
        self._waiting: dict[int, _Waiting] = {}  # by the index of the group
        self._was_said = False

    def note(self, groups: Iterable[LayerGroup], step: int) -> None:
        """``groups`` are about to be stepped, as the step of this number.

        Raises:
            RuntimeError: No backward pass has reached a group since its first turn, a whole sweep ago; or none of 16
                steps of its own has.
        """
        for group in groups:
            if any(p.grad is not None for p in group.parameters.values()):
                self._never.pop(group.index, None)
                self._end_waiting(group.index)
                continue
            self.count += 1
            self._say(group)
            if group.index not in self._never:
                continue
            self._never[group.index] += 1
            if self._never[group.index] >= _MANY:
                _refuse(group, f"none of its first {_MANY} steps has reached it")
            if group.index not in self._waiting and group.index not in self._reached:
                self._waiting[group.index] = _Waiting(group, step)
        for waiting in list(self._waiting.values()):
            if waiting.was_reached:
                self._end_waiting(waiting.group.index)
            elif step - waiting.since >= self._patience:
                _refuse(
                    waiting.group, f"since its first turn, {self._patience} steps ago, no backward pass has reached it"
                )

    def trainable(self, active: Collection[nn.Parameter]) -> set[nn.Parameter]:
        """Parameters that are trainable now beside ``active``, so that a backward pass may reach them."""
        found: set[nn.Parameter] = set()
        for waiting in list(self._waiting.values()):
            if waiting.was_reached:
                self._end_waiting(waiting.group.index)
            else:
                waiting.active = active
                found |= waiting.watched
        return found

    def close(self) -> None:
        """Wait for no group any more, and leave the parameters alone."""
        for waiting in self._waiting.values():
            waiting.close()
        self._waiting = {}

    def _end_waiting(self, index: int) -> None:
        self._reached.add(index)
        if index in self._waiting:
            self._waiting.pop(index).close()

    def _say(self, group: LayerGroup) -> None:
        if not self._was_said:
            warnings.warn(
                f"Layer group {group.index} ({group.name}) got no gradient in its turn, which passes without an update,"
                " as will others like it without a further word. Either the forward pass left it out for this batch"
                " (layer dropout, a head or tower that is used at times), or the gradients were dropped after the"
                " backward pass (zero_grad, p.grad = None). A group that no backward pass reaches in a whole sweep is"
                " refused.",
                stacklevel=2,
            )
            self._was_said = True


def _refuse(group: LayerGroup, how: str) -> None:
    raise RuntimeError(f"Layer group {group.index} ({group.name}) has never had a gradient: {how}. {CAUSES}")


class _Waiting:
    """A group that never had a gradient, since the step in which it missed its turn."""

    def __init__(self, group: LayerGroup, since: int) -> None:
        self.group = group
        self.since = since
        self.was_reached = False
        # Of sharded ones the whole parameter is what gets a gradient, and the part only its result.
        self.watched = {p for p in group.parameters.values() if p.requires_grad and not is_sharded(p)}
        self.active: Collection[nn.Parameter] = self.watched
        self._hooks: list[Any] = [
            cast(Any, p).register_post_accumulate_grad_hook(partial(_Waiting._on_gradient, self)) for p in self.watched
        ]

    def _on_gradient(self, p: Tensor) -> None:
        self.was_reached = True
        if p not in self.active:
            p.grad = None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
