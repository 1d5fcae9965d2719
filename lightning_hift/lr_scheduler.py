"""One learning rate for all groups of a sweep, for any scheduler."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal, get_args

import torch

from lightning_hift.engine import HiFTEngine

HoldLR = Literal["replay", "once", "off"]

_CHECKPOINT_KEY = "hift"
_SCHEDULED = ("lr", "momentum", "betas")  # the options that torch's schedulers change


class SweepLR:
    """Holds back the steps of a learning-rate scheduler until the sweep is over (HiFT, algorithm 1, delayed update).

    It stands in for the scheduler: every other attribute, and its class, are the scheduler's own.

    A schedule that starts at a learning rate of 0 would waste the whole first sweep. The first sweep then already uses
    the learning rate of the second.

    Args:
        scheduler: Any scheduler with ``step`` and ``state_dict``.
        engine: The engine of the scheduler's optimizer.
        hold_lr: ``"replay"`` makes up for all held-back steps at the end of the sweep, so the schedule ends when it
            should. ``"once"`` makes one step per sweep, as in the paper: a schedule that was sized in optimizer steps
            gets only 1/k of the way. ``"off"`` holds nothing back.
        steps_ahead: How many steps of a schedule that starts at 0 lie between two sweeps; default: one per optimizer
            step.

    Raises:
        ValueError: ``hold_lr`` is unknown.
    """

    def __init__(
        self, scheduler: Any, engine: HiFTEngine, hold_lr: HoldLR = "replay", steps_ahead: int | None = None
    ) -> None:
        check_hold_lr(hold_lr)
        self._scheduler = scheduler
        self._engine = engine
        self._hold_lr = hold_lr
        self._pending: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._at_zero: list[dict[str, Any]] | None = (
            None  # the options that a first sweep at learning rate 0 would have
        )
        self._before_finish: dict[str, Any] | None = None
        if hold_lr != "off" and engine.step == 0 and starts_at_zero(scheduler):
            self._look_ahead(1 if hold_lr == "once" else steps_ahead or engine.schedule.steps_per_sweep)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Take note of a step of the schedule, and make up for all of them if the sweep is over."""
        if self._hold_lr == "off":
            self._scheduler.step(*args, **kwargs)
            return
        self._pending.append((args, kwargs))
        self.flush()

    def flush(self) -> None:
        """Apply what was held back, if no sweep is under way."""
        if self._engine.at_sweep_start:
            self._apply()

    def finish(self) -> None:
        """Apply what was held back although the sweep is not over: the run ends here.

        A checkpoint that is written later still has the learning rate of the unfinished sweep, so that a longer run
        which resumes from it is the same as one that was never interrupted.
        """
        if self._pending and self._before_finish is None:
            state = copy.deepcopy(self.state_dict())
            state[_CHECKPOINT_KEY]["options"] = self._options()
            self._before_finish = state
            self._apply()

    def _apply(self) -> None:
        pending, self._pending = self._pending, []
        if pending and self._at_zero is not None:
            self._set_options(self._at_zero)
            self._at_zero = None
        for args, kwargs in pending[-1:] if self._hold_lr == "once" else pending:
            self._scheduler.step(*args, **kwargs)

    def _look_ahead(self, steps: int) -> None:
        """Use the learning rate that the schedule has after ``steps``, with the scheduler itself still at its start."""
        start, self._at_zero = copy.deepcopy(self._scheduler.state_dict()), self._options()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(min(steps, getattr(self._scheduler, "total_steps", steps))):
                self._scheduler.step()
        ahead = self._options()
        self._scheduler.load_state_dict(start)
        self._set_options(ahead)

    def _options(self) -> list[dict[str, Any]]:
        groups = self._engine.optimizer.param_groups
        return [{key: _plain(group[key]) for key in _SCHEDULED if key in group} for group in groups]

    def _set_options(self, options: list[dict[str, Any]]) -> None:
        for group, saved in zip(self._engine.optimizer.param_groups, options, strict=True):
            for key, value in saved.items():
                if isinstance(group[key], torch.Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state, and under ``"hift"`` what is held back."""
        if self._before_finish is not None:
            return self._before_finish
        held: dict[str, Any] = {
            "pending": [(_plain(args), _plain(kwargs)) for args, kwargs in self._pending],
            "at_zero": self._at_zero,
        }
        return {**self._scheduler.state_dict(), _CHECKPOINT_KEY: held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or one of the bare scheduler."""
        state_dict = dict(state_dict)
        held = state_dict.pop(_CHECKPOINT_KEY, None)
        self._scheduler.load_state_dict(state_dict)
        self._before_finish = None
        self._pending = [(tuple(args), dict(kwargs)) for args, kwargs in held["pending"]] if held else []
        self._at_zero = held["at_zero"] if held else None
        if held and "options" in held:
            self._set_options(held["options"])

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._scheduler)

    def __getattr__(self, name: str) -> Any:
        if name == "_scheduler":  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._scheduler, name)


def is_held(scheduler: Any) -> bool:
    """Whether ``scheduler`` is a ``SweepLR``; ``isinstance`` sees the class of what it stands in for."""
    return type(scheduler) is SweepLR


def check_hold_lr(hold_lr: str) -> None:
    """Refuse a mode that does not exist.

    Raises:
        ValueError: ``hold_lr`` is unknown.
    """
    if hold_lr not in get_args(HoldLR):
        raise ValueError(f"Got hold_lr={hold_lr!r}; choose one of {', '.join(map(repr, get_args(HoldLR)))}.")


def starts_at_zero(scheduler: Any) -> bool:
    """Whether all learning rates are 0 now, for a schedule whose base learning rates are not."""
    groups = scheduler.optimizer.param_groups
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return False  # it only ever lowers them
    return all(float(g["lr"]) == 0 for g in groups) and any(float(g.get("initial_lr", 0)) > 0 for g in groups)


def _plain(value: Any) -> Any:
    """``value`` with tensors of one element as numbers, so that it can be loaded without trusting the file."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(v) for v in value])
    return value
