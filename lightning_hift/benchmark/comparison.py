"""HiFT beside plain full fine-tuning: same weights to start from, same data, same optimizer, same time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_hift.benchmark.run_meter import RunMeter
from lightning_hift.callback import find_callback
from lightning_hift.data import PythonSourceDataModule, order0_bits_per_byte
from lightning_hift.table import format_bytes, format_table


class FullFineTuningComparison(RunMeter):
    """After a HiFT ``fit``, trains a fresh copy of the model by full fine-tuning and prints both runs side by side.

    Full fine-tuning starts from the same weights, sees the same batches in the same order, builds its optimizer by the
    same ``configure_optimizers`` and trains for the same wall-clock time, validation excluded from both. A full step
    takes longer than a HiFT step, so there are fewer of them; the learning-rate schedule of a run by steps is therefore
    stretched: at each moment it is as far along as HiFT's was after the same share of the time. Both models are
    validated once at the end. Costs a second training, and one copy of the weights in host memory.

    Args:
        lr_factor: Full fine-tuning's learning rate as a multiple of HiFT's. With ``lr_scale=1.0`` its best one is
            smaller than HiFT's, whose layers get a share of the updates each: tune it, or the comparison is not fair.

    Raises:
        ValueError: ``lr_factor`` is not above 0.
        MisconfigurationException: In ``fit``: there is no HiFTCallback, or the run resumes from a checkpoint.
    """

    def __init__(self, lr_factor: float = 1.0) -> None:
        super().__init__()
        if lr_factor <= 0:
            raise ValueError(f"Got lr_factor={lr_factor}; it must be above 0.")
        self.lr_factor = lr_factor

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if find_callback(trainer) is None:
            raise MisconfigurationException(
                "FullFineTuningComparison got no HiFT run to compare with. Add a HiFTCallback, or use strategy='hift'."
            )
        RunMeter.__init__(self)
        self._untrained = copy.deepcopy(pl_module)  # before HiFT freezes anything in it

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # configure_model has run by now, so all weights exist.
        self._initial_weights = {name: value.cpu().clone() for name, value in pl_module.state_dict().items()}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > 0:
            raise MisconfigurationException(
                f"FullFineTuningComparison compares whole runs, but this one goes on from step {trainer.global_step}."
                " Start it anew, or take the comparison out."
            )
        super().on_train_start(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (bar := trainer.progress_bar_callback) is not None:
            bar.teardown(trainer, pl_module, "fit")  # a terminal shows one live display of rich at a time
        data = copy.copy(trainer.datamodule)  # type: ignore[attr-defined]
        horizons = [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs]
        full = _FullRun(self.seconds, horizons, self.lr_factor)
        print(f"\nFull fine-tuning for comparison, for the same {self.seconds:.1f} s of training:")
        model = self._copy_of_model(self._initial_weights)
        _trainer_like(trainer, callbacks=[full], max_epochs=-1, limit_val_batches=0).fit(model, datamodule=data)

        judge = _trainer_like(trainer, enable_progress_bar=False, limit_val_batches=trainer.limit_val_batches)
        (of_hift,) = judge.validate(self._copy_of_model(pl_module.state_dict()), datamodule=data, verbose=False)
        (of_full,) = judge.validate(model, datamodule=data, verbose=False)
        print(_report(self, full, of_hift, of_full, trainer.strategy.root_device))
        if isinstance(data, PythonSourceDataModule):
            bits = order0_bits_per_byte(data.train_bytes, data.val_bytes)
            print(f"A model that knows only how often each byte occurs (order 0) needs {bits:.4f} bits per byte.")

    def _copy_of_model(self, weights: Mapping[str, Tensor]) -> pl.LightningModule:
        model = copy.deepcopy(self._untrained)
        model.configure_model()
        model.load_state_dict(weights)
        return model


class _FullRun(RunMeter):
    """Meters a run and ends it after some seconds of training."""

    def __init__(self, limit: float, horizons: Sequence[int], lr_factor: float) -> None:
        super().__init__()
        self.limit = limit
        self._horizons = horizons
        self.lr_factor = lr_factor

    @property
    def share(self) -> float:
        """Share of the time that has passed, at most 1."""
        return min(1.0, self.seconds / self.limit)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scheduled = [config.scheduler.optimizer for config in trainer.lr_scheduler_configs]
        for group in (
            g for optimizer in trainer.optimizers if optimizer not in scheduled for g in optimizer.param_groups
        ):
            group["lr"] *= self.lr_factor
        for config, horizon in zip(trainer.lr_scheduler_configs, self._horizons, strict=True):
            by_step = config.interval == "step"
            config.scheduler = cast(Any, _StretchedLR(config.scheduler, horizon if by_step else None, self))
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        trainer.should_stop = self.share >= 1


class _StretchedLR:
    """Stands in for a scheduler and takes so many of its steps that it keeps pace with the clock.

    Args:
        scheduler: The scheduler of the timed run.
        horizon: How many steps it is to take in the whole time; ``None``: one at each call.
        run: The clock.
    """

    def __init__(self, scheduler: Any, horizon: int | None, run: _FullRun) -> None:
        self._scheduler = scheduler
        self._horizon = horizon
        self._run = run
        self._lr_factor = run.lr_factor
        self._learning_rates = [group["lr"] for group in scheduler.optimizer.param_groups]
        self._scale()

    def step(self, *args: Any) -> None:
        groups = self._scheduler.optimizer.param_groups
        for group, lr in zip(groups, self._learning_rates, strict=True):
            group["lr"] = lr  # a scheduler may compute the next learning rate from the one it has set
        if self._horizon is None:
            self._scheduler.step(*args)
        else:
            while self._scheduler.last_epoch < round(self._run.share * self._horizon):
                self._scheduler.step()
        self._learning_rates = [group["lr"] for group in groups]
        self._scale()

    def _scale(self) -> None:
        for group, lr in zip(self._scheduler.optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = lr * self._lr_factor

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._scheduler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)


def _trainer_like(trainer: pl.Trainer, **options: Any) -> pl.Trainer:
    """A Trainer without HiFT on the same device that writes no files."""
    device = trainer.strategy.root_device
    shared: dict[str, Any] = {
        "accelerator": device.type,
        "devices": 1 if device.index is None else [device.index],
        "precision": trainer.precision,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "enable_progress_bar": trainer.progress_bar_callback is not None,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**shared, **options})


def _report(
    hift: RunMeter, full: _FullRun, of_hift: Mapping[str, float], of_full: Mapping[str, float], device: torch.device
) -> str:
    rows: list[list[object]] = [
        ["parameters that train at once", *(f"{run.trainable_parameters:,}" for run in (hift, full))],
        ["optimizer state on the device", *(format_bytes(run.state_bytes) for run in (hift, full))],
        ["optimizer steps", *(f"{run.steps:,}" for run in (hift, full))],
        ["seconds per batch (median)", *(f"{run.seconds_per_step:.3f}" for run in (hift, full))],
        ["seconds of training", *(f"{run.seconds:.1f}" for run in (hift, full))],
    ]
    rows += [[name, f"{of_hift[name]:.4f}", f"{of_full[name]:.4f}"] for name in of_hift]
    notes = [
        "The first two rows are peaks. Both runs had the same initial weights, data, optimizer and seconds of training"
        f" (validation excluded). Full fine-tuning's learning rate is {full.lr_factor:g} times HiFT's.",
        "Bytes are counted tensor by tensor."
        + (" On a CPU, host and device are the same memory: nothing is saved here." if device.type == "cpu" else ""),
    ]
    return "\n".join(["", format_table(["", "HiFT", "full fine-tuning"], rows), *notes])
