"""What a checkpoint holds of a run beside weights and optimizer: its place in the data, and its random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from torch import Tensor

from lightning_hift.engine.random_state import RandomState

_STATES = 4  # of random numbers, which are the first fields


class RunPosition(NamedTuple):
    """Where a run goes on.

    Args:
        now: The random numbers with which it does.
        pass_start: Those with which the loader was iterated, for the pass through the data that is under way.
        first_fetch: Those with which its first batch was fetched.
        last_fetch: Those with which something was fetched last before the batch that comes: one more, of a loader
            without length.
        is_first_pass: Whether the loader had never been iterated before.
        batches: How many batches of that pass are done.
        is_over: Whether these were all.
        is_midway: Whether another one was under way; it will be trained on again.
        has_stepped: Whether the optimizer's step of that one had been made.
        ends_batch: Whether what follows a batch was still to come: validation, schedulers that wait for a metric.
        is_validated: Whether only the validation of it had been done.
        ends_epoch: Whether what follows the last batch of an epoch was still to come.
        metrics: What was logged last, for schedulers that wait for a metric.
    """

    now: RandomState
    pass_start: RandomState | None = None
    first_fetch: RandomState | None = None
    last_fetch: RandomState | None = None
    is_first_pass: bool = True
    batches: int = 0
    is_over: bool = False
    is_midway: bool = False
    has_stepped: bool = False
    ends_batch: bool = False
    is_validated: bool = False
    ends_epoch: bool = False
    metrics: Mapping[str, Tensor] = MappingProxyType({})

    def state_dict(self) -> dict[str, Any]:
        """In tensors and numbers, with the random numbers of all processes. All of them call it together."""
        states = (self.now, self.pass_start, self.first_fetch, self.last_fetch)
        own = [None if state is None else state.state_dict() for state in states]
        everyones = [own]
        if dist.is_available() and dist.is_initialized():
            everyones = [own] * dist.get_world_size()
            dist.all_gather_object(everyones, own)
        return {**dict(zip(self._fields[_STATES:], self[_STATES:], strict=True)), "random_states": everyones}

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any], rank: int) -> RunPosition:
        """For the process with number ``rank``; one that had no part in the saved run takes the first one's."""
        everyones = saved["random_states"]
        own = everyones[rank if rank < len(everyones) else 0]
        states = [None if state is None else RandomState.from_state_dict(state) for state in own]
        return cls(*cast(Any, states), **{name: saved[name] for name in cls._fields[_STATES:] if name in saved})

    @property
    def is_known(self) -> bool:
        """Whether more than the random numbers is known, as of a checkpoint that was written in a run."""
        return self.pass_start is not None

    @property
    def is_within_epoch(self) -> bool:
        """Whether the epoch of the last batch goes on."""
        return not self.is_over or self.ends_batch
