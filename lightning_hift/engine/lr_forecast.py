"""What a learning-rate scheduler will do in the steps to come, and what a sweep makes of it."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from lightning_hift.groups.selection import SelectionPolicy

SPANS_RUN = "spans_run"
"""Attribute of a scheduler that was sized in the optimizer steps of the whole run."""

NEGLIGIBLE = 0.01  # the share of a learning rate that is as good as none

_SCHEDULED = ("lr", "momentum", "betas")  # the options that torch's schedulers change
_ASKED = ("lr", "initial_lr", "max_lr")  # where an optimizer or a scheduler keeps the largest learning rate asked for
_FARTHEST = 10_000  # optimizer steps; what comes later decides nothing

Options = list[dict[str, Any]]
"""Learning rate and the like of each parameter group."""


class RunLength(NamedTuple):
    """How long a run is, and when plain training would step a scheduler in it.

    Args:
        total_steps: Optimizer steps of the run; infinity if that is not known.
        calls_by: How often the scheduler is stepped before the optimizer step of a given number, counted from 0.
        is_whole: Whether nothing of the schedule lies beyond the end of the run, as far as can be told.
    """

    total_steps: float = math.inf
    calls_by: Callable[[int], int] = int
    is_whole: bool = False


class LRForecast:
    """Steps a copy of a scheduler ahead, and says which learning rate each sweep uses.

    Args:
        scheduler: To be copied; not changed. Its ``step`` needs no arguments.
        optimizer: The scheduler's.
        policy: Says where sweeps begin.
        run: How long the run is.
        once: Whether the scheduler is stepped once per sweep, not as in plain training.
        step: The optimizer step that comes next; the scheduler is where it has to be for it.
    """

    def __init__(
        self, scheduler: Any, optimizer: Optimizer, policy: SelectionPolicy, run: RunLength, once: bool, step: int
    ) -> None:
        self._scheduler, self._optimizer = copy_scheduler(scheduler, optimizer)
        self._policy, self._run, self._once = policy, run, once
        self._origin = policy.sweep_at(step) if once else run.calls_by(step)
        self._values = [options_of(self._optimizer)]  # after so many calls
        last_epoch, total = getattr(scheduler, "last_epoch", 0), getattr(scheduler, "total_steps", None)
        self._most_calls = total - last_epoch if isinstance(total, int) else math.inf
        self._asked = [max(_number(group.get(key)) for key in _ASKED) for group in optimizer.param_groups]

    def of_sweep(self, start: int) -> Options:
        """The options of the sweep, or of what is left of it, that begins with optimizer step ``start``."""
        end = start + 1
        while not self._policy.starts_sweep(end) and end - start < _FARTHEST:
            end += 1
        if not self._once:
            return self._mean(start, end)
        own = self._after(self._policy.sweep_at(start) - self._origin)
        if own is None:
            return self._values[-1]
        if start > 0 or not any(_is_less(now, asked) for now, asked in zip(own, self._asked, strict=True)):
            return own
        if end >= self._run.total_steps:  # no second sweep, so this one goes through the schedule as far as it comes
            return self._mean(start, end)
        following = self._after(1) or own
        return [
            {**now, "lr": f["lr"]} if _is_less(now, f["lr"]) else now for now, f in zip(own, following, strict=True)
        ]

    def is_wasted(self) -> bool:
        """Whether no sweep of the whole run has a learning rate of at least 1 % of what was asked for."""
        start = 0
        while start < min(self._run.total_steps, _FARTHEST):
            used = self.of_sweep(start)
            if not all(_is_less(now, asked) for now, asked in zip(used, self._asked, strict=True) if asked > 0):
                return False
            start += 1
            while not self._policy.starts_sweep(start) and start < _FARTHEST:
                start += 1
        return any(asked > 0 for asked in self._asked) and self._run.total_steps <= _FARTHEST

    def _mean(self, start: int, end: int) -> Options:
        if end > self._run.total_steps and self._ends_with_run():
            end = max(start + 1, int(self._run.total_steps))
        values = (self._after(self._run.calls_by(step) - self._origin) for step in range(start, end))
        return _mean_of([value for value in values if value is not None] or self._values[-1:])

    def _ends_with_run(self) -> bool:
        """Whether the schedule is over when the run is: it refuses to go on, has come to 0, or falls no further.

        One that goes on as before knows nothing of the run's end and is read beyond it, so that a run that is cut short
        has the learning rates of one that is not.
        """
        if self._run.is_whole or getattr(self._scheduler, SPANS_RUN, False):
            return True
        calls = self._run.calls_by(int(self._run.total_steps)) - self._origin
        around = [self._after(calls + offset) for offset in (-1, 0, 1) if calls + offset >= 0]
        if any(options is None for options in around):
            return True
        *before, at_end, beyond = (sum(now["lr"] for now in options or ()) for options in around)
        return at_end < NEGLIGIBLE * sum(self._asked) or bool(before and before[0] > at_end and beyond >= at_end)

    def _after(self, calls: int) -> Options | None:
        """The options after so many more calls of ``step``, or ``None`` if the scheduler does not go so far."""
        while len(self._values) <= calls:
            if len(self._values) >= self._most_calls:
                return None
            try:
                with _without_step_order_warnings():
                    self._scheduler.step()
            except Exception:  # of any kind: nobody has asked it to go there, and if somebody does, it raises again
                self._most_calls = len(self._values)
                return None
            self._values.append(options_of(self._optimizer))
        return self._values[calls]


def can_be_read_ahead(scheduler: Any) -> bool:
    """Whether ``step()`` can be called as it is: not with a metric, as on a plateau, nor with an epoch."""
    parameters = inspect.signature(scheduler.step).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return not any(p.kind in positional and p.default is p.empty for p in parameters)


def copy_scheduler(scheduler: Any, optimizer: Optimizer) -> tuple[Any, Optimizer]:
    """A scheduler that can be stepped without harm, on an optimizer that has nothing but options."""
    stand_in = torch.optim.SGD([torch.zeros(())], lr=0.0)
    stand_in.param_groups = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"} | {"params": []}
        for group in optimizer.param_groups
    ]
    stand_in.defaults = optimizer.defaults
    return _copy_onto(stand_in, scheduler, optimizer), stand_in


def apply_calls(scheduler: Any, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    """Step ``scheduler`` with these arguments, without torch's warnings about the order of steps."""
    with _without_step_order_warnings():
        for args, kwargs in calls:
            scheduler.step(*args, **kwargs)


def options_of(optimizer: Optimizer) -> Options:
    """What schedulers change in each parameter group, as plain numbers."""
    return [{key: plain(group[key]) for key in _SCHEDULED if key in group} for group in optimizer.param_groups]


def set_options(optimizer: Optimizer, options: Options, where: Options | None = None) -> None:
    """Write ``options`` into the parameter groups; with ``where`` only in the place of these values."""
    there = options_of(optimizer)
    for index, (group, new) in enumerate(zip(optimizer.param_groups, options, strict=True)):
        for key, value in new.items():
            if where is not None and there[index][key] != where[index][key]:
                continue
            if isinstance(group[key], torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value


def plain(value: Any) -> Any:
    """``value`` with tensors of one element as numbers, so that it can be loaded without trusting the file."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([plain(v) for v in value])
    return value


def _copy_onto(stand_in: Optimizer, scheduler: Any, optimizer: Optimizer) -> Any:
    """A copy on another optimizer, schedulers inside it included, but nothing that its functions may belong to."""

    def is_optimizer(value: Any) -> bool:
        wraps = isinstance(value, Optimizer) and getattr(value, "optimizer", None) is optimizer  # as Fabric's does
        return value is optimizer or wraps

    def copied(value: Any) -> Any:
        if is_optimizer(value):
            return stand_in
        if is_optimizer(getattr(value, "optimizer", None)) and hasattr(value, "state_dict"):
            return _copy_onto(stand_in, value, optimizer)
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(copied(v) for v in value)
        return copy.copy(value) if isinstance(value, dict) else value

    twin = copy.copy(scheduler)
    vars(twin).update({name: copied(value) for name, value in vars(scheduler).items()})
    return twin


def _mean_of(several: Sequence[Options]) -> Options:
    def mean(values: Sequence[Any]) -> Any:
        first = values[0]
        if all(value == first for value in values):
            return first  # to the bit
        if isinstance(first, (tuple, list)):
            return type(first)(mean(column) for column in zip(*values, strict=True))
        return math.fsum(values) / len(values)

    return [{key: mean([each[key] for each in group]) for key in group[0]} for group in zip(*several, strict=True)]


def _is_less(now: dict[str, Any], asked: float) -> bool:
    return bool("lr" in now and now["lr"] < NEGLIGIBLE * asked)


def _number(value: Any) -> float:
    value = plain(value)
    return float(value) if isinstance(value, (int, float)) else 0.0


@contextmanager
def _without_step_order_warnings() -> Iterator[None]:
    """torch warns where a scheduler is stepped and its optimizer was not; a copy's never is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        warnings.filterwarnings("ignore", message="Seems like `optimizer.step")
        yield
