"""What the schedulers of an optimizer will do in the steps to come, and what a sweep makes of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from lightning_hift.engine.scheduler_copy import copy_scheduler, on_trial, stand_in_for, why_not_copied
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
        calls_by: How often the scheduler is stepped before the optimizer step of a given number, counted from 0;
            ``None`` if that is not known.
        is_whole: Whether nothing of the schedule lies beyond the end of the run, as far as can be told.
    """

    total_steps: float = math.inf
    calls_by: Callable[[int], int] | None = int
    is_whole: bool = False


@dataclass(eq=False)
class Schedule:
    """A scheduler of an optimizer, and when it is stepped.

    Args:
        scheduler: Any.
        once: Whether it takes one step per sweep, not as in plain training.
        run: How long the run is.
        stepped_in: The last sweep in which it took a step.
    """

    scheduler: Any
    once: bool = False
    run: RunLength = field(default_factory=RunLength)
    stepped_in: int = -1

    def why_not_foreseen(self, optimizer: Optimizer) -> str | None:
        """What rules it out that a copy is stepped ahead, in words."""
        if self.run.calls_by is None:
            return "is stepped by hand, nobody knows when"
        parameters = inspect.signature(self.scheduler.step).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        needed = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
        return f"waits for {needed[0]}" if needed else why_not_copied(self.scheduler, optimizer)


class LRForecast:
    """Steps copies of schedulers ahead, and says which learning rate each sweep uses.

    Args:
        schedules: Those of the optimizer, in the order in which they are stepped. What cannot be foreseen is taken to
            stay as it is.
        optimizer: The schedulers'; not changed.
        policy: Says where sweeps begin.
        step: The optimizer step that comes next; the schedulers are where they have to be for it.
    """

    def __init__(self, schedules: Sequence[Schedule], optimizer: Optimizer, policy: SelectionPolicy, step: int) -> None:
        self._policy, self._step = policy, step
        self._optimizer = stand_in_for(optimizer)
        self._copies: list[tuple[Schedule, Any]] = []
        self.unforeseen: list[str] = []
        """Schedulers that cannot be foreseen, and why, in words."""
        for schedule in schedules:
            why = schedule.why_not_foreseen(optimizer)
            if why is None:
                try:
                    twin = copy_scheduler(schedule.scheduler, optimizer, self._optimizer)
                    self._copies.append((schedule, twin))
                except Exception as error:  # of any kind: generators, locks, open files
                    why = f"cannot be copied ({error})"
            if why is not None:
                self.unforeseen.append(f"{type(schedule.scheduler).__name__} {why}")
        self._total = min((schedule.run.total_steps for schedule in schedules), default=math.inf)
        self._values = [options_of(self._optimizer)]  # at this optimizer step and at those that follow
        self._is_over = False  # a scheduler goes no further
        self._asked = [max(_number(group.get(key)) for key in _ASKED) for group in optimizer.param_groups]
        now = zip(self._values[0], self._asked, strict=True)
        self.begins_with_nothing = any(_is_less(options, asked) for options, asked in now)
        """Whether some learning rate is less than 1 % of what was asked for."""
        ends_before = step == 0 and self._end_of_sweep(0) >= self._total  # no second sweep that it could step for
        self._goes_once = not (self.begins_with_nothing and ends_before)

    @property
    def is_blind(self) -> bool:
        """Whether nothing can be foreseen."""
        return not self._copies

    def of_sweep(self, start: int) -> Options:
        """The options of the sweep, or of what is left of it, that begins with optimizer step ``start``."""
        end = self._end_of_sweep(start)
        used = self._mean(start, end)
        steps_once = self._goes_once and any(schedule.once for schedule, _ in self._copies)
        if start > 0 or not (steps_once and self.begins_with_nothing) or end >= self._total:
            return used
        following = self._at(end) or used
        return [
            {**now, "lr": f["lr"]} if _is_less(now, f["lr"]) else now for now, f in zip(used, following, strict=True)
        ]

    def is_wasted(self) -> bool:
        """Whether no sweep of the whole run has a learning rate of at least 1 % of what was asked for."""
        start = 0
        while start < min(self._total, _FARTHEST):
            used = self.of_sweep(start)
            if not all(_is_less(now, asked) for now, asked in zip(used, self._asked, strict=True) if asked > 0):
                return False
            start = self._end_of_sweep(start)
        return any(asked > 0 for asked in self._asked) and self._total <= _FARTHEST

    def _end_of_sweep(self, start: int) -> int:
        end = start + 1
        while not self._policy.starts_sweep(end) and end - start < _FARTHEST:
            end += 1
        return end

    def _mean(self, start: int, end: int) -> Options:
        if end > self._total and self._ends_with_run():
            end = max(start + 1, int(self._total))
        self._at(end - 1)  # and so all before it
        values = (self._at(step) for step in range(start, end))
        return _mean_of([value for value in values if value is not None] or self._values[-1:])

    def _ends_with_run(self) -> bool:
        """Whether the schedule is over when the run is: it refuses to go on, has come to 0, or falls no further.

        One that goes on as before knows nothing of the run's end and is read beyond it, so that a run that is cut short
        has the learning rates of one that is not.
        """
        if all(each.run.is_whole or getattr(each.scheduler, SPANS_RUN, False) for each, _ in self._copies):
            return True
        end = int(self._total)
        stride = max(math.ceil(end / max(1, self._calls_by(each, end))) for each, _ in self._copies)
        around = [self._at(step) for step in (end - stride, end, end + stride) if step >= self._step]
        if len(around) < 2 or any(options is None for options in around):
            return True
        *before, at_end, beyond = (sum(now["lr"] for now in options or ()) for options in around)
        return at_end < NEGLIGIBLE * sum(self._asked) or bool(before and before[0] > at_end and beyond >= at_end)

    def _calls_by(self, schedule: Schedule, step: int) -> int:
        if schedule.once and self._goes_once:
            return self._policy.sweep_at(step)
        assert schedule.run.calls_by is not None  # it could not be foreseen
        return schedule.run.calls_by(step)

    def _at(self, step: int) -> Options | None:
        """The options at an optimizer step to come, or ``None`` if a scheduler does not go so far."""
        index = step - self._step
        if index >= len(self._values) and not self._is_over:
            with on_trial():
                while index >= len(self._values) and not self._is_over:
                    self._go_on(self._step + len(self._values))
        return self._values[index] if index < len(self._values) else None

    def _go_on(self, step: int) -> None:
        for schedule, twin in self._copies:
            for _ in range(self._calls_by(schedule, step) - self._calls_by(schedule, step - 1)):
                total = getattr(twin, "total_steps", None)
                try:
                    self._is_over |= isinstance(total, int) and twin.last_epoch + 1 >= total
                    if not self._is_over:
                        twin.step()
                except Exception:  # of any kind: nobody has asked it to go there, and if somebody does, it raises again
                    self._is_over = True
        if not self._is_over:
            self._values.append(options_of(self._optimizer))


def options_of(optimizer: Optimizer) -> Options:
    """What schedulers change in each parameter group, as plain numbers."""
    return [{key: _plain(group[key]) for key in _SCHEDULED if key in group} for group in optimizer.param_groups]


def set_options(groups: Sequence[dict[str, Any]], options: Options, where: Options | None = None) -> None:
    """Write ``options`` into ``groups``, of an optimizer; with ``where`` only in the place of these values."""
    for index, (group, new) in enumerate(zip(groups, options, strict=True)):
        for key, value in new.items():
            if where is not None and _plain(group[key]) != where[index][key]:
                continue
            if isinstance(group[key], torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value


def _plain(value: Any) -> Any:
    """``value`` with tensors of one element as numbers, so that it can be loaded without trusting the file."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(v) for v in value])
    return value


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
    return bool(now.get("lr") is not None and now["lr"] < NEGLIGIBLE * asked)


def _number(value: Any) -> float:
    value = _plain(value)
    return float(value) if isinstance(value, (int, float)) else 0.0
