"""Everything that a benchmark wants to know of one fit, as a file of JSON."""

from __future__ import annotations

import json
from collections.abc import Hashable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_hift.benchmark.run_meter import Reading, RunMeter, state_bytes_on_device
from lightning_hift.planner.allocations import AllocationTracker
from lightning_hift.planner.memory import process_memory
from lightning_hift.plugin.callback import find_callback
from lightning_hift.plugin.training_speed import count_tokens

_MOST_POINTS = 200  # of the curve of training loss
_MOST_SETS = 48  # of parameters that train together, of which the memory is looked at
_LARGER = 1.25  # times the batch that was looked at before, and it is looked at again


class RunMeasures(RunMeter):
    """Writes metrics, time, speed, memory and updates of a fit to a file when it ends.

    Memory is that of the paper's table: parameters, gradients, optimizer state, and the residual, which is activations
    and what else is alive at the peak of forward and backward. On a GPU that peak is torch's own; elsewhere tensors are
    counted: it is what would live on a device. Temporary tensors of the optimizer's step are in neither. Memory is
    looked at for each set of parameters that trains, and again for batches that are clearly larger than those before.
    Such a batch is slow, and counts as much as the others on average in the time. A run that ends in mid-epoch is
    validated once more, so that its metrics are those of its last step.

    Args:
        path: The file, replaced if it exists.
        memory: Whether to look at memory.
    """

    def __init__(self, path: str, memory: bool = True) -> None:
        super().__init__()
        self.path = Path(path)
        self.memory = memory
        self._tokens: int | Tensor = 0
        self._losses: list[tuple[int, Reading, Tensor]] = []
        self._points: list[tuple[Reading, dict[str, Any]]] = []  # of the curve
        self._rate = 0.0
        self._exposed_ms = 0.0
        self._host_state = 0
        self._seen: dict[Hashable, int] = {}  # elements of the largest batch, by what trains
        self._trains: Hashable = None  # in this batch
        self._by_group: dict[str, dict[str, int]] = {}
        self._gradients = 0
        self._accumulated = 0  # bytes of gradients of the micro-batches before this one
        self._activations = 0
        self._validated_at = 0
        self._tracked = ExitStack()
        self._tracker: AllocationTracker | None = None
        self._step_before = 0

    # --- hooks, in the order in which they run ------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._gradients = self._activations = 0
        self._accumulated = _gradient_bytes(pl_module)
        self._step_before = trainer.global_step
        self._trains = _what_trains(trainer, pl_module)
        size = sum(t.numel() for t in tree_leaves(batch) if isinstance(t, Tensor))
        has_room = self._trains in self._seen or len(self._seen) < _MOST_SETS
        if not self.memory or not has_room or size < _LARGER * self._seen.get(self._trains, 0):
            return
        self._seen[self._trains] = size
        self.stop()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._tracker = self._tracked.enter_context(AllocationTracker())

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._rate = max(self._rate, *(float(group["lr"]) for group in optimizer.param_groups))
        if self._since is None:
            self._gradients = _gradient_bytes(pl_module)
            if self._device.type == "cuda":
                there = _weight_bytes(pl_module) + self._gradients + state_bytes_on_device(trainer)
                self._activations = torch.cuda.max_memory_allocated(self._device) - there
            self._end_tracking()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._end_tracking()
        has_stepped = trainer.global_step > self._step_before
        if self._since is None:
            if has_stepped:
                self._note_memory(trainer, pl_module)
            else:  # look at the batch that ends the step
                del self._seen[self._trains]
            self.start()
        self._tokens = self._tokens + (count_tokens(batch) or 0)
        self._note_loss(trainer, outputs)
        hift = find_callback(trainer)
        if hift is not None and has_stepped:
            self._exposed_ms += sum(engine.offloader.exposed_ms() for engine in hift.engines)
            self._host_state = max(self._host_state, sum(engine.offloader.host_bytes for engine in hift.engines))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and self.steps:
            self._points.append(self._point(trainer))
            self._validated_at = self.steps
        super().on_validation_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.enable_validation and self._validated_at != self.steps:
            self._validate(trainer)
        before = [(reading, point) for reading, point in self._points if point["step"] < self.steps]
        curve = [{**point, **self._rounded(reading)} for reading, point in (*before, self._point(trainer))]
        self.path.write_text(json.dumps({**self._summary(trainer, pl_module, curve[-1]), "curve": curve}) + "\n")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end_tracking()

    def _validate(self, trainer: pl.Trainer) -> None:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        self.stop()  # as on_validation_end has started the clock

    # --- what is noted ------------------------------------------------------------------------------------------------

    def _end_tracking(self) -> None:
        if self._tracker is not None:
            self._activations = self._tracker.peak - (self._gradients - self._accumulated)
            self._tracker = None
            self._tracked.close()

    def _note_memory(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        weights, state = _weight_bytes(module), self.state_bytes
        hift = find_callback(trainer)
        name = "all" if hift is None or len(hift.groups) == 1 else " + ".join(e.active_group.name for e in hift.engines)
        found = {"parameters": weights, "gradients": self._gradients, "state": state, "residual": self._activations}
        self._by_group[name] = max(found, self._by_group.get(name, found), key=lambda parts: sum(parts.values()))

    def _note_loss(self, trainer: pl.Trainer, outputs: STEP_OUTPUT) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._losses.append((trainer.global_step, self.reading, loss.detach().float()))

    def _point(self, trainer: pl.Trainer) -> tuple[Reading, dict[str, Any]]:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        return self.reading, {"step": self.steps, "tokens": int(self._tokens), **metrics}

    def _rounded(self, reading: Reading) -> dict[str, float]:
        wall, cpu = self.seconds(reading)
        return {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}

    def _summary(self, trainer: pl.Trainer, module: pl.LightningModule, last: dict[str, Any]) -> dict[str, Any]:
        steps = max(1, self.steps)
        owned = {p: p.numel() for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        return {
            **last,
            "epochs": round(self.batches / trainer.num_training_batches, 3),
            "learning_rate": self._rate,
            "seconds_per_step": last["seconds"] / steps,
            "cpu_seconds_per_step": last["cpu_seconds"] / steps,
            "tokens_per_second": last["tokens"] / last["seconds"] if last["tokens"] else None,
            "tokens_per_cpu_second": last["tokens"] / last["cpu_seconds"] if last["tokens"] else None,
            "device": self._device.type,
            "parameters": sum(p.numel() for p in module.parameters()),
            "trained_parameters": sum(owned.values()),
            "trainable_at_once": self.trainable_parameters,
            "updates_per_parameter": self.updated / max(1, sum(owned.values())),
            "state_on_device": self.state_bytes,
            "state_on_host": self._host_state,
            "exposed_ms_per_step": self._exposed_ms / steps,
            "host_peak": process_memory("VmHWM"),
            **self._memory(),
            "losses": self._loss_curve(),
        }

    def _loss_curve(self) -> list[dict[str, float]]:
        """Step, seconds and mean loss of stretches of equal length."""
        length = max(1, -(-len(self._losses) // _MOST_POINTS))
        stretches = [self._losses[i : i + length] for i in range(0, len(self._losses), length)]
        return [
            {
                "step": stretch[-1][0],
                **self._rounded(stretch[-1][1]),
                "loss": round(float(torch.stack([loss for *_, loss in stretch]).mean()), 5),
            }
            for stretch in stretches
        ]

    def _memory(self) -> dict[str, Any]:
        if not self._by_group:
            return {}
        # State is at its largest only when every group has some.
        groups = {name: {**parts, "state": self.state_bytes} for name, parts in self._by_group.items()}
        peak = max(groups.values(), key=lambda parts: sum(parts.values()))
        return {"memory": {**peak, "total": sum(peak.values())}, "memory_by_group": groups}


def _what_trains(trainer: pl.Trainer, module: pl.LightningModule) -> Hashable:
    """In the batch that begins, for which HiFT may choose the group after this callback has had its turn."""
    hift = find_callback(trainer)
    if hift is None:
        return tuple(p.requires_grad for p in module.parameters())
    return tuple(frozenset(engine.policy.groups_at(engine.step)) for engine in hift.engines)


def _weight_bytes(module: pl.LightningModule) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def _gradient_bytes(module: pl.LightningModule) -> int:
    return sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
