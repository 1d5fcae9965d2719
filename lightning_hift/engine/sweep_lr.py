"""One learning rate for all groups of a sweep, for any scheduler."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, get_args

from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.lr_forecast import SPANS_RUN, RunLength, Schedule

HoldLR = Literal["replay", "once", "off"]

_OWN = {"_schedule", "_rates"}


class SweepLR:
    """Holds the learning rate constant in each sweep, for any scheduler (HiFT, algorithm 1, delayed update).

    In a sweep all groups use the mean of what plain training would use over the same optimizer steps, so each layer
    sees the learning rates of plain training on average. The scheduler goes on in the background as in plain training,
    and the next sweep begins where that is. Where the schedule ends with the run, a sweep that the run does not finish
    uses the mean over the steps that are left: nothing is read beyond the end of a schedule.

    It stands in for the scheduler: every other attribute, its class, and what copies and pickles hold, are the
    scheduler's own. The learning rate of the sweep travels in the state of the optimizer, where plain torch ignores it.
    With one layer group, as in full fine-tuning, nothing is held.

    Args:
        scheduler: Any scheduler with ``step`` and ``state_dict``. Copies of it are stepped ahead. Where that is not
            possible (``step`` needs an argument, such as a metric; it holds what cannot be copied, or may change what
            is no part of it) a sweep uses the learning rate of its start, and a first sweep that would start with
            (nearly) 0 follows the scheduler.
        engine: The engine of the scheduler's optimizer.
        hold_lr: ``"replay"`` steps the scheduler as in plain training, so the schedule ends when it should. ``"once"``
            makes one step per sweep, as in the paper, and is for schedules that are sized in sweeps. Where that starts
            at a learning rate of (nearly) 0, the first sweep uses the second one's. ``"off"`` holds nothing.
        total_steps: Optimizer steps of the run, if they are known.

    Raises:
        ValueError: ``hold_lr`` is unknown.
    """

    def __init__(
        self, scheduler: Any, engine: HiFTEngine, hold_lr: HoldLR = "replay", total_steps: float = math.inf
    ) -> None:
        check_hold_lr(hold_lr)
        once = hold_lr == "once" and not getattr(scheduler, SPANS_RUN, False)
        self._schedule = Schedule(scheduler, once, RunLength(total_steps))
        self._rates = None if hold_lr == "off" or len(engine.groups) == 1 else engine.rates
        if self._rates is not None:
            self._rates.add(self._schedule)

    def expect(self, run: RunLength) -> None:
        """Choose learning rates by what is known of the run now."""
        self._schedule.run = run
        if self._rates is not None:
            self._rates.begin()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the scheduler; the learning rate stays until the sweep is over."""
        if self._rates is None:
            self._schedule.scheduler.step(*args, **kwargs)
        else:
            self._rates.step(self._schedule, *args, **kwargs)

    def finish(self) -> None:
        """Let the scheduler's learning rate be in force although the sweep is not over: the run ends here."""
        if self._rates is not None:
            self._rates.finish()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the scheduler. A sweep goes on if the optimizer's state, loaded before, is of the same."""
        if self._rates is None:
            self._schedule.scheduler.load_state_dict(state_dict)
        else:
            self._rates.load_scheduler(self._schedule, state_dict)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _itself, (self._schedule.scheduler,)

    def __copy__(self) -> Any:
        return copy.copy(self._schedule.scheduler)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._schedule.scheduler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule.scheduler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._schedule.scheduler, name, value)


def schedule_of(scheduler: Any) -> Schedule | None:
    """What is known of a ``SweepLR``, and of nothing else: ``isinstance`` sees the class of what it stands in for."""
    return scheduler._schedule if type(scheduler) is SweepLR else None


def check_hold_lr(hold_lr: str) -> None:
    """Refuse a mode that does not exist.

    Raises:
        ValueError: ``hold_lr`` is unknown.
    """
    if hold_lr not in get_args(HoldLR):
        raise ValueError(f"Got hold_lr={hold_lr!r}; choose one of {', '.join(map(repr, get_args(HoldLR)))}.")


def _itself(scheduler: Any) -> Any:
    return scheduler
