"""How fast a run goes: samples and tokens per second of training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightning_hift.plugin.late_value import LateValue


class _Counted(NamedTuple):
    seconds: float
    samples: int
    tokens: int | Tensor | None  # a tensor where they are counted on the device, which nobody waits for


class TrainingSpeed(Callback):
    """Logs ``train_samples_per_second`` and, for batches with ``input_ids``, ``train_tokens_per_second``.

    Both are means over the last logging interval (the Trainer's ``log_every_n_steps``) with all that belongs to it,
    data and optimizer too, but without validation. Tokens are those that ``attention_mask`` lets through, where there
    is one, so padding does not count. The progress bar shows tokens, or samples where there are none.

    It costs one small sum per batch. Nothing waits for a device: the bar shows what was counted a few batches ago, and
    on a GPU, steps are still under way when the clock is read; over an interval of several batches that evens out.
    """

    def __init__(self) -> None:
        self._window: deque[_Counted] = deque()
        self._since = 0.0
        self._seconds = 0.0
        self._samples = 0
        self._tokens: int | Tensor | None = 0
        self._shown = LateValue()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._window.clear()
        self._seconds, self._samples, self._tokens = 0.0, 0, 0
        self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        samples = _count_samples(batch)
        if samples is None or trainer.barebones:
            return
        self._add(_Counted(now - self._since, samples, count_tokens(batch)))
        self._since = now
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        while len(self._window) > max(1, every) * trainer.accumulate_grad_batches:  # as loggers count
            self._drop()
        self._log(pl_module, "samples", self._samples, on_bar=self._tokens is None)
        if self._tokens is not None:
            self._log(pl_module, "tokens", self._tokens, on_bar=True)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def _add(self, counted: _Counted) -> None:
        self._window.append(counted)
        self._seconds += counted.seconds
        self._samples += counted.samples
        if counted.tokens is None or self._tokens is None:
            self._tokens = None  # batches of two kinds: there is no rate of tokens
        else:
            self._tokens = self._tokens + counted.tokens

    def _drop(self) -> None:
        first = self._window.popleft()
        self._seconds -= first.seconds
        self._samples -= first.samples
        if first.tokens is not None and self._tokens is not None:
            self._tokens = self._tokens - first.tokens

    def _log(self, pl_module: pl.LightningModule, what: str, count: int | Tensor, on_bar: bool) -> None:
        # As a tensor, of the host unless it was counted elsewhere: Lightning would copy a plain number to the device.
        rate = torch.as_tensor(count, dtype=torch.float32) / max(self._seconds, 1e-9)
        shown = self._shown.update(rate, pl_module.trainer)
        pl_module.log(f"train_{what}_per_second", shown, prog_bar=on_bar, batch_size=1)


def _count_samples(batch: Any) -> int | None:
    """Length of the first tensor's first dimension; ``None`` without tensors."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = [batch["input_ids"]] if "input_ids" in batch else list(batch.values())
    found = map(_count_samples, batch) if isinstance(batch, (list, tuple)) else ()
    return next((count for count in found if count is not None), None)


def count_tokens(batch: Any) -> int | Tensor | None:
    """Tokens of ``input_ids`` without padding; ``None`` where there are none."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        return None
    mask = batch.get("attention_mask")
    return mask.sum(dtype=torch.long) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()
