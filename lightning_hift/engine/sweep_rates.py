"""What an optimizer is stepped with in a sweep, in the place of what its schedulers have set."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_hift.engine.lr_forecast import LRForecast, Options, Schedule, options_of, set_options
from lightning_hift.groups.selection import SelectionPolicy


class SweepRates:
    """Holds the learning rates of an optimizer within a sweep, while its schedulers go on as they do without HiFT.

    Schedulers find in ``param_groups`` what they have left there, all others what is in force in the sweep. What
    somebody else writes there counts for both.

    Args:
        optimizer: Whose.
        policy: Says where sweeps begin.
        step: The optimizer step that comes next.
    """

    def __init__(self, optimizer: Optimizer, policy: SelectionPolicy, step: Callable[[], int]) -> None:
        self.schedules: list[Schedule] = []
        """Of the schedulers that are held, in the order in which they are stepped."""
        self.changes: list[str] = []
        """What of the checkpoint that was loaded is not as it was saved, in words."""
        self.unforeseen: list[str] = []
        """Schedulers that the sweep could not foresee, and why, in words."""
        self._optimizer, self._policy, self._step = optimizer, policy, step
        self._own: Options | None = None  # the schedulers', while those of a sweep are held
        self._used: Options = []  # the latter
        self._is_finished = False  # the schedulers' are in force all the same
        self._sweep = -1
        self._loaded: tuple[int, dict[str, Any]] | None = None

    def add(self, schedule: Schedule) -> None:
        """Hold one more scheduler, from now on."""
        self.schedules.append(schedule)
        self.begin()

    def keep(self, schedules: Sequence[Schedule]) -> None:
        """Hold no others than these from now on."""
        kept = [schedule for schedule in self.schedules if schedule in schedules]
        if len(kept) < len(self.schedules):
            self.schedules = kept
            self.begin()

    def begin(self) -> None:
        """Choose the learning rates of the sweep, or of what is left of it, or go on with those of a checkpoint."""
        self._hold()
        self.changes = []
        if self._loaded is None:
            return
        step, state = self._loaded
        if step == self._step() and state["sweep"] == self._sweep:
            self._resume(state)

    def step(self, schedule: Schedule, *args: Any, **kwargs: Any) -> None:
        """Step a scheduler, and choose the learning rates of a sweep that begins with that."""
        self._loaded = None
        step = self._step()
        sweep = self._policy.sweep_at(max(0, step - 1))  # of the optimizer step that was made
        if not schedule.once or schedule.stepped_in != sweep:
            schedule.stepped_in = sweep
            with self._released():
                schedule.scheduler.step(*args, **kwargs)
        if self._policy.starts_sweep(step) or self._sweep != self._policy.sweep_at(step):
            self._hold()

    def flush(self) -> None:
        """If a sweep has begun, choose its learning rates."""
        if self._sweep != self._policy.sweep_at(self._step()):
            self._hold()

    def finish(self) -> None:
        """Let the schedulers' learning rates be in force although the sweep is not over: the run ends here.

        A checkpoint that is written later still has those of the unfinished sweep, so that a longer run which resumes
        from it is the same as one that was never interrupted.
        """
        if self._is_in_force:
            self._own, self._used = self._now()
            set_options(self._optimizer.param_groups, self._own)
        self._is_finished = True

    def refuse_waste(self) -> None:
        """For a run that has not begun.

        Raises:
            ValueError: No learning rate in it would reach 1 % of what was asked for.
        """
        if not self.schedules:
            return
        with self._released():
            forecast = self._forecast()
        if not forecast.is_blind and forecast.is_wasted():
            total = min(schedule.run.total_steps for schedule in self.schedules)
            names = " and ".join(type(schedule.scheduler).__name__ for schedule in self.schedules)
            once = any(schedule.once for schedule in self.schedules)
            raise ValueError(
                f"In this run of {total:g} optimizer steps {names} never reaches 1 % of the learning rate that was"
                " asked for, so nothing would be learned. Make its warm-up shorter than the"
                f" run{', use hold_lr=replay' if once else ''}, or train longer."
            )

    # --- what travels with the optimizer ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any] | None:
        """The learning rates in force, and how the schedulers were when they were chosen; ``None`` without any.

        Not the schedulers' state, which is saved elsewhere, but a copy: where both differ, somebody has changed them.
        """
        if not self.schedules:
            return None
        own, used = self._now()
        return {
            "own": own,
            "used": None if self._own is None else used,
            "sweep": self._sweep,
            "schedulers": [
                {"state": _copied(s.scheduler.state_dict()), "stepped_in": s.stepped_in} for s in self.schedules
            ],
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take over a ``state_dict``, once ``param_groups`` are loaded; schedulers may follow before the next step."""
        self._own, self._is_finished = None, False
        self._loaded = None if state is None else (self._step(), state)
        self.begin()

    def load_scheduler(self, schedule: Schedule, state: dict[str, Any]) -> None:
        """Load the state of a scheduler."""
        with self._released():
            schedule.scheduler.load_state_dict(state)
        self.begin()

    def write_own(self, groups: list[dict[str, Any]]) -> None:
        """Write the schedulers' learning rates into copies of ``param_groups``."""
        if self._is_in_force:
            for group in groups:
                group |= {key: value.clone() for key, value in group.items() if isinstance(value, Tensor)}
            set_options(groups, self._now()[0])

    def _resume(self, state: dict[str, Any]) -> None:
        """Go on with what a checkpoint brings, but for what was changed in it: that is as ``_hold`` has left it."""
        own, _ = self._now()
        latest = max((each["stepped_in"] for each in state["schedulers"]), default=-1)
        for schedule in self.schedules:
            now = schedule.scheduler.state_dict()
            same = [each["stepped_in"] for each in state["schedulers"] if _is_same(each["state"], now)]
            schedule.stepped_in = same[0] if same else latest
            if not same:
                self.changes.append(f"the state of {type(schedule.scheduler).__name__}")
        holds = not self.changes or all(schedule.once for schedule in self.schedules)  # which look no further
        for index, (was, now) in enumerate(zip(state["own"], own, strict=True)):
            changed = [f"{key}={now[key]} of parameter group {index}" for key in now if was.get(key) != now[key]]
            self.changes += changed
        if state["used"] is None and not self.changes:
            self._release()
        if state["used"] is None or not holds:
            return
        used = [
            {key: value for key, value in each.items() if key in now and was.get(key) == now[key]}
            for was, now, each in zip(state["own"], own, state["used"], strict=True)
        ]
        set_options(self._optimizer.param_groups, used)
        self._own, self._used = own, options_of(self._optimizer)

    # --- helpers ------------------------------------------------------------------------------------------------------

    @property
    def _is_in_force(self) -> bool:
        return self._own is not None and not self._is_finished

    def _now(self) -> tuple[Options, Options]:
        """The schedulers' learning rates and those of the sweep, with what somebody else has changed in both."""
        now = options_of(self._optimizer)
        if self._own is None or self._is_finished:
            return self._own or now, self._used
        changed = [
            {key: value for key, value in group.items() if value != used[key]}
            for group, used in zip(now, self._used, strict=True)
        ]
        return [own | new for own, new in zip(self._own, changed, strict=True)], now

    @contextmanager
    def _released(self) -> Iterator[None]:
        """In this context the schedulers' learning rates are in force."""
        if not self._is_in_force:
            yield
            return
        own, self._used = self._now()
        set_options(self._optimizer.param_groups, own)
        try:
            yield
        finally:
            self._own = options_of(self._optimizer)
            set_options(self._optimizer.param_groups, self._used)

    def _release(self) -> None:
        if self._is_in_force:
            set_options(self._optimizer.param_groups, self._now()[0])
        self._own, self._is_finished = None, False

    def _forecast(self) -> LRForecast:
        return LRForecast(self.schedules, self._optimizer, self._policy, self._step())

    def _hold(self) -> None:
        self._release()
        self._sweep = self._policy.sweep_at(self._step())
        if not self.schedules:
            return
        forecast = self._forecast()
        self.unforeseen = forecast.unforeseen
        if forecast.is_blind and forecast.begins_with_nothing and self._sweep == 0:
            return  # held, the first sweep would learn nothing
        used = forecast.of_sweep(self._step())
        self._own = options_of(self._optimizer)
        set_options(self._optimizer.param_groups, used)
        self._used = options_of(self._optimizer)  # as a tensor has rounded it


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    with suppress(Exception):  # of any kind, and then it is not saved either
        return copy.deepcopy(state)
    return state


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    with suppress(Exception):  # whatever a foreign value makes of a comparison
        if bool(a == b):
            return True
    with suppress(Exception):
        return pickle.dumps(a) == pickle.dumps(b)
    return False
