"""What ``state_dict``, ``load_state_dict`` and copies of an optimizer hold while it is under an engine."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from lightning_hift.engine.optimizer_state import OptimizerState, parameters_of
from lightning_hift.engine.state_partition import UndividedState
from lightning_hift.engine.stepped_options import SteppedOptions
from lightning_hift.engine.sweep_rates import SweepRates
from lightning_hift.groups.fingerprint import check_fingerprint

_KEY = "hift"  # of what a state_dict holds beside that of the optimizer's class


class Saving:
    """All state in the form of ``torch.optim``, and under a key of its own the position in the run.

    Args:
        optimizer: Whose.
        state: All of its state.
        counters: The counters in its ``param_groups``.
        rates: The learning rates in there that are held.
        partition: Which of the state is kept in this process.
        position: The position: ``step``, and what the policy has ``learned``.
        fingerprint: Of what has to be the same where it is loaded.
        go_to: Takes up a position; an empty one is the beginning.
        after_load: Is called when everything was loaded.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        state: OptimizerState,
        counters: SteppedOptions,
        rates: SweepRates,
        partition: UndividedState,
        position: Callable[[], dict[str, Any]],
        fingerprint: Callable[[], dict[str, Any]],
        go_to: Callable[[Mapping[str, Any]], None],
        after_load: Callable[[], None],
    ) -> None:
        self._optimizer = optimizer
        self._state = state
        self._counters = counters
        self._rates = rates
        self._partition = partition
        self._position = position
        self._fingerprint = fingerprint
        self._go_to = go_to
        self._after_load = after_load
        self._has_all_state = partition.world_size == 1
        self._num_owned = len(parameters_of(optimizer))
        self._rates_on_load: dict[str, Any] | None = None
        self._counters_on_load: list[Any] = []
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            optimizer.load_state_dict = self._load_own_format  # type: ignore[method-assign]  # it may call no hooks
        optimizer.__getstate__ = self._get_state  # type: ignore[method-assign]  # for copies and pickles
        self._hooks = [
            optimizer.register_state_dict_post_hook(self._complete),
            optimizer.register_load_state_dict_pre_hook(self._divert),
            optimizer.register_load_state_dict_post_hook(self._finish_load),
        ]

    def remove(self) -> None:
        """Let the optimizer save and load as its class does."""
        for hook in self._hooks:
            hook.remove()
        for name in ("load_state_dict", "__getstate__"):
            vars(self._optimizer).pop(name, None)

    def _complete(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        collected = self._state.collect()
        others = {k: v for k, v in state_dict["state"].items() if k not in range(self._num_owned)}
        state_dict["state"] = collected.state | others
        self._rates.write_own(state_dict["param_groups"])
        state_dict[_KEY] = {
            **self._position(),
            "dtypes": collected.dtypes,
            "masters": collected.masters,
            "counters": self._counters.state_dict(),
            "rates": self._rates.state_dict(),
            **({} if self._has_all_state else {"part": [self._partition.rank, self._partition.world_size]}),
            **self._fingerprint(),
        }

    def _divert(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in optimizer.param_groups]:
            return None  # torch raises its own error for this
        position = state_dict.get(_KEY) or {}
        if "part" in position:
            rank, world_size = position["part"]
            raise RuntimeError(
                f"This is the part of the optimizer's state that process {rank} of {world_size} has kept. Load what"
                " Trainer.save_checkpoint has written, which is all of it."
            )
        if position:
            check_fingerprint(position, self._fingerprint())
        rest = self._state.replace(state_dict, position.get("dtypes"), position.get("masters", {}))
        self._rates_on_load = position.get("rates")
        self._counters_on_load = position.get("counters", [])
        self._go_to(position)
        return {**{k: v for k, v in state_dict.items() if k != _KEY}, "state": rest}

    def _load_own_format(self, state_dict: dict[str, Any]) -> None:
        """In the place of an optimizer's own ``load_state_dict``."""
        position = {key: value for key, value in state_dict.items() if key == _KEY}
        own = {key: value for key, value in state_dict.items() if key != _KEY}
        Optimizer.load_state_dict(self._optimizer, self._state.read_own_format(own) | position)

    def _get_state(self) -> dict[str, Any]:
        """What copies and pickles hold: an ordinary optimizer with all state, but without masters and counters."""
        collected, owned = self._state.collect().state, parameters_of(self._optimizer)
        own: dict[str, Any] = type(self._optimizer).__getstate__(self._optimizer)
        state = {owned[i]: values for i, values in collected.items()}
        groups = [dict(group) for group in own["param_groups"]]
        self._rates.write_own(groups)
        return {**own, "state": defaultdict(dict, {**own["state"], **state}), "param_groups": groups}

    def _finish_load(self, optimizer: Optimizer) -> None:
        self._state.keep_apart()
        self._counters.load_state_dict(self._counters_on_load)
        self._after_load()
        self._rates.load_state_dict(self._rates_on_load)

    @contextmanager
    def gathered(self, directory: str | os.PathLike[str], group: dist.ProcessGroup | None = None) -> Iterator[None]:
        """In this context, which all processes enter together, the first one's ``optimizer.state_dict()`` is whole.

        Args:
            directory: Where the first process puts files for what the others have kept.
            group: All processes, over a backend for tensors on the host; default: the default group.

        Raises:
            OSError: In all processes: the disk of the first one is full.
        """
        self._state.gather(directory, group)
        self._has_all_state = self._partition.rank == 0
        try:
            yield
        finally:
            self._state.forget_others()
            self._has_all_state = self._partition.world_size == 1
