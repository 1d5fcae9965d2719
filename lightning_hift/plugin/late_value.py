"""Numbers of a device on the host, for a progress bar, without a wait for the device."""

from __future__ import annotations

from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class LateValue:
    """A number that changes at each step, as it was when it last reached the host."""

    def __init__(self) -> None:
        self._known = torch.tensor(torch.nan)
        self._coming: deque[tuple[Tensor, Any]] = deque()

    def update(self, value: Tensor, trainer: pl.Trainer) -> Tensor:
        """Send the newest one on its way.

        Args:
            value: Shape (), on any device.
            trainer: Whose bar shows it.

        Returns:
            The newest one that has arrived, on the host: of a few steps ago, NaN before the first. ``value`` itself
            where there is nothing to wait for, and in the batches whose values loggers get.
        """
        is_logged = trainer._logger_connector.should_update_logs or trainer.fast_dev_run  # type: ignore[attr-defined]
        streams = torch.get_device_module(value.device)
        if is_logged or value.device.type == "cpu" or not hasattr(streams, "current_stream"):
            return value
        there = torch.empty((), dtype=value.dtype, pin_memory=True)
        there.copy_(value.detach(), non_blocking=True)
        self._coming.append((there, streams.current_stream(value.device).record_event()))
        while self._coming and self._coming[0][1].query():
            self._known = self._coming.popleft()[0]
        return self._known

    def __getstate__(self) -> dict[str, Any]:
        # Events cannot be copied, and what is on its way belongs to this one.
        return {"_known": self._known, "_coming": deque()}
