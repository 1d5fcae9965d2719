"""What a run of training takes: seconds without validation, steps, what trains at once, state on the device."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.offload.state_tree import count_bytes
from lightning_hift.plugin.callback import find_callback


class Seconds(NamedTuple):
    """Of the clock on the wall, and of the processor, which other programs on the machine hardly lengthen."""

    wall: float = 0.0
    cpu: float = 0.0

    def plus(self, other: Seconds, times: float = 1.0) -> Seconds:
        """The sum with a multiple of ``other``."""
        return Seconds(self.wall + times * other.wall, self.cpu + times * other.cpu)


class Reading(NamedTuple):
    """Of the clock, with the number of batches during which it stood still."""

    timed: Seconds
    untimed_batches: int


class RunMeter(Callback):
    """Measures a training run. Seconds are those between the first batch and the last one, without validation."""

    def __init__(self) -> None:
        self.trainable_parameters = 0  # at once, at the most
        self.state_bytes = 0  # on the device, at the most
        self.updated = 0  # elements, summed over the steps
        self.steps = 0
        self._stepping: dict[Optimizer, int] = {}  # elements that this batch updates
        self._timed_batches = 0
        self._device = torch.device("cpu")
        self._timed = Seconds()
        self._since: Seconds | None = None  # None while the clock stands still
        self._untimed_batches = 0

    @property
    def reading(self) -> Reading:
        """What the clock says now."""
        running = Seconds() if self._since is None else _now().plus(self._since, -1)
        return Reading(self._timed.plus(running), self._untimed_batches)

    def seconds(self, reading: Reading) -> Seconds:
        """Training until ``reading``. A batch during which the clock stood still counts as much as the others of the
        run on average, so that what was read later is never less."""
        missing = reading.untimed_batches / max(1, self._timed_batches)
        return reading.timed.plus(self.reading.timed, missing)

    @property
    def batches(self) -> int:
        """Batches that were trained on."""
        return self._timed_batches + self._untimed_batches

    def stop(self) -> None:
        """Stop the clock, if it runs."""
        if self._since is not None:
            self._wait()
            self._timed, self._since = self._timed.plus(_now()).plus(self._since, -1), None

    def start(self) -> None:
        """Start the clock, if it stands still."""
        if self._since is None:
            self._wait()
            self._since = _now()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._device = trainer.strategy.root_device
        self.start()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self.trainable_parameters = max(self.trainable_parameters, trainable)
        # Not summed up here: an optimizer without gradients comes by with each of its forward passes.
        owned = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        self._stepping[optimizer] = sum(p.numel() for p in owned)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if self._since is None:
            self._untimed_batches += 1
        else:
            self._timed_batches += 1
        self.updated += sum(self._stepping.values())
        self._stepping = {}
        self.steps = trainer.global_step
        self.state_bytes = max(self.state_bytes, state_bytes_on_device(trainer))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.start()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def state_bytes_on_device(trainer: pl.Trainer) -> int:
    """Bytes of optimizer state on the device; on a CPU, those that would be there."""
    hift = find_callback(trainer)
    if hift is not None:
        return sum(engine.offloader.device_bytes for engine in hift.engines)
    return sum(count_bytes(state) for optimizer in trainer.optimizers for state in optimizer.state.values())


def _now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())
