"""How far each layer moved: |update| relative to |weight|, by layer unit and sweep."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.optimizer_state import parameters_of
from lightning_hift.engine.row_slices import Piece
from lightning_hift.engine.state_partition import UndividedState
from lightning_hift.groups.grouping import LayerUnit, find_layer_units
from lightning_hift.plugin.callback import find_callback
from lightning_hift.plugin.layer_updates_plot import plot_layer_updates

_PART = 2**22  # elements
_COLUMNS = ("sweep", "unit", "parameters", "steps", "update", "weight", "relative")


class LayerUpdates(Callback):
    """Records how far each layer unit moves, and draws it, so that you see that every layer is trained.

    Writes ``layer_updates.csv`` and ``layer_updates.png`` (layer unit against sweep) when training ends, however it
    ends, and names the units that never moved. A value is the L2 norm of a unit's update in one step, relative to that
    of its weights, as a mean over the unit's steps in the sweep. With master weights, these are compared. Without HiFT,
    every optimizer step counts as a sweep.

    In a sweep that is measured, each step copies what it is about to change to the host, and afterwards compares it
    there: the step waits for two transfers of the active group's weights (or masters), and the host holds one copy of
    them. Without HiFT it is the whole model at each step, so measure only now and then.

    Args:
        folder: Where to write; default: the folder of the logs, or the Trainer's ``default_root_dir``.
        every_n_sweeps: Measure the first of so many sweeps.
        plot: Draw the picture; needs matplotlib.

    Raises:
        ValueError: ``every_n_sweeps`` is below 1.
        RuntimeError: In ``fit``: matplotlib is not installed.
    """

    def __init__(self, folder: str | Path | None = None, every_n_sweeps: int = 1, plot: bool = True) -> None:
        if every_n_sweeps < 1:
            raise ValueError(f"Got every_n_sweeps={every_n_sweeps}; it must be at least 1.")
        self.folder = None if folder is None else Path(folder)
        self.every_n_sweeps = every_n_sweeps
        self.plot = plot
        self.sizes: dict[str, int] = {}
        """Trainable elements of each layer unit by its name, from the input upwards."""
        self._sums: dict[tuple[int, str], list[float]] = {}  # steps, and sums of: update, weight, relative
        self._meters: list[_Meter] = []
        self._detach: list[Callable[[], None]] = []

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per sweep and unit: sweep, unit, parameters, steps, update, weight, relative (means over steps)."""
        found = []
        place = {unit: i for i, unit in enumerate(self.sizes)}
        for (sweep, unit), (steps, *sums) in sorted(self._sums.items(), key=lambda e: (e[0][0], place.get(e[0][1], 0))):
            update, weight, relative = (total / steps for total in sums)
            values = (sweep, unit, self.sizes.get(unit, 0), int(steps), update, weight, relative)
            found.append(dict(zip(_COLUMNS, values, strict=True)))
        return found

    @property
    def never_moved(self) -> list[str]:
        """Units that no measured step has changed."""
        moved = {unit for (_, unit), (_, update, *_) in self._sums.items() if update > 0}
        return [unit for unit in self.sizes if unit not in moved]

    # --- hooks --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._sums = {}
        if self.plot and find_spec("matplotlib") is None:
            raise RuntimeError(
                "LayerUpdates draws with matplotlib, which is not installed. Run: pip install lightning-hift[plot], or"
                " set plot=False."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()
        hift = find_callback(trainer)
        watched = (
            [self._watch_engine(engine) for engine in hift.engines]
            if hift is not None
            else [self._watch_optimizer(trainer, optimizer) for optimizer in trainer.optimizers]
        )
        self._meters = [meter for meter, _ in watched]
        self.sizes = {}
        for number, (meter, units) in enumerate(watched):
            prefix = f"optimizer {number}: " if len(watched) > 1 else ""
            for unit in units:
                self.sizes[prefix + unit.name] = unit.numel
                meter.owner |= dict.fromkeys(unit.parameters.values(), prefix + unit.name)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for meter in self._meters:
            meter.leave_others()
        self._finish(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        for meter in self._meters:
            meter.flush()
        return {"sums": [[sweep, unit, *values] for (sweep, unit), values in self._sums.items()]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums = {(sweep, unit): values for sweep, unit, *values in state_dict["sums"]}

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _watch_engine(self, engine: HiFTEngine) -> tuple[_Meter, list[LayerUnit]]:
        # The engine counts a step before it lends the weights.
        def place() -> tuple[int, int]:
            return engine.step, engine.policy.sweep_at(engine.step - 1)

        meter = _Meter(self._add, place, self.every_n_sweeps, engine.partition)
        engine.watchers.append(meter)
        self._detach += [meter.flush, lambda: engine.watchers.remove(meter)]
        return meter, [*(unit for group in engine.groups for unit in group.units), *engine.always_active]

    def _watch_optimizer(self, trainer: pl.Trainer, optimizer: Optimizer) -> tuple[_Meter, list[LayerUnit]]:
        bare: Optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        parameters = [p for p in parameters_of(bare) if p.requires_grad]
        pieces = [Piece(p, p) for p in parameters]
        steps = trainer.global_step // len(trainer.optimizers) - 1

        def before(*_: Any) -> None:
            nonlocal steps
            steps += 1
            meter.before_step(pieces)

        def after(*_: Any) -> None:
            meter.after_step()

        meter = _Meter(self._add, lambda: (steps, steps), self.every_n_sweeps)
        hooks = [bare.register_step_pre_hook(before), bare.register_step_post_hook(after)]
        self._detach += [meter.flush, *(hook.remove for hook in hooks)]
        return meter, find_layer_units(trainer.lightning_module, parameters=parameters)

    def _add(self, sweep: int, unit: str, update: float, weight: float) -> None:
        sums = self._sums.setdefault((sweep, unit), [0, 0.0, 0.0, 0.0])
        for i, value in enumerate((1, update, weight, update / weight if weight else float(update > 0))):
            sums[i] += value

    def _release(self) -> None:
        for detach in self._detach:
            detach()
        self._detach, self._meters = [], []

    def _finish(self, trainer: pl.Trainer) -> None:
        if not self._detach:
            return
        self._release()
        if not trainer.is_global_zero:
            return
        folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "layer_updates.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        if self.plot and self._sums:
            plot_layer_updates(self.rows, list(self.sizes), folder / "layer_updates.png")
        self._tell(folder)

    def _tell(self, folder: Path) -> None:
        still = self.never_moved
        if not still:
            rank_zero_info(f"All {len(self.sizes)} layer units moved; see layer_updates.* in {folder}")
            return
        reached = {unit for _, unit in self._sums}
        named = [unit if unit in reached else f"{unit} (no measured step reached it)" for unit in still]
        rank_zero_warn(f"{len(still)} of {len(self.sizes)} layer units never moved: {', '.join(named)}.")


class _Meter:
    """Measures the steps of one optimizer.

    Args:
        add: Takes what a step did to a unit: sweep, unit, norm of the update, norm of the weights.
        place: The number of the step that is under way, and its sweep.
        every_n_sweeps: See ``LayerUpdates``.
        partition: Which process steps what; default: this one everything.
    """

    def __init__(
        self,
        add: Callable[[int, str, float, float], None],
        place: Callable[[], tuple[int, int]],
        every_n_sweeps: int,
        partition: UndividedState | None = None,
    ) -> None:
        self.owner: dict[nn.Parameter, str] = {}
        self._add = add
        self._place = place
        self._every_n_sweeps = every_n_sweeps
        self._partition = partition or UndividedState()
        self._now = (-1, -1)
        self._is_measured = False
        self._before: list[tuple[Piece, Tensor]] = []
        self._squares: dict[str, list[float]] = {}  # of the step that is under way, which may have several turns

    def before_step(self, pieces: Sequence[Piece]) -> None:
        if self._place() != self._now:
            self.flush()
            self._now = self._place()
            self._is_measured = self._now[1] % self._every_n_sweeps == 0
        measured = pieces if self._is_measured else ()
        self._before = [(piece, piece.handle.detach().to("cpu", copy=True)) for piece in measured]

    def after_step(self) -> None:
        for piece, before in self._before:
            update, weight = _squares(before, piece.handle.detach().to("cpu"))
            squares = self._squares.setdefault(self.owner[piece.parameter], [0.0, 0.0])
            squares[0] += update
            squares[1] += weight
        self._before = []

    def flush(self) -> None:
        """Hand over the last step, which is over, with what all processes have found."""
        if self._is_measured:
            found = torch.zeros(len(units := list(dict.fromkeys(self.owner.values()))), 3, dtype=torch.float64)
            for i, unit in enumerate(units):
                if unit in self._squares:
                    found[i] = torch.tensor([1, *self._squares[unit]], dtype=torch.float64)
            for unit, (is_stepped, update, weight) in zip(units, self._partition.sum(found).tolist(), strict=True):
                if is_stepped:
                    self._add(self._now[1], unit, update**0.5, weight**0.5)
        self._squares, self._is_measured = {}, False

    def leave_others(self) -> None:
        """Leave out the last step: other processes may have stopped elsewhere, so that nobody sums it up."""
        if self._partition.world_size > 1:
            self._squares, self._is_measured = {}, False


def _squares(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Sums of squares of ``after - before`` and of ``before``."""
    update = weight = 0.0
    for old, new in zip(torch.split(before.reshape(-1), _PART), torch.split(after.reshape(-1), _PART), strict=True):
        wide = torch.complex128 if old.is_complex() else torch.float64
        update += float((new.to(wide) - old.to(wide)).abs().square().sum())
        weight += float(old.to(wide).abs().square().sum())
    return update, weight
