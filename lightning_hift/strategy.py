"""``strategy="hift"``: one device, with the optimizer state of inactive groups elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.callback import HiFTCallback
from lightning_hift.engine import HiFTEngine
from lightning_hift.offload import Offload, StateOffloader


class HiFTStrategy(SingleDeviceStrategy):
    """Trains on one device with HiFT; says where optimizer state lives and how it moves.

    What trains when is the ``HiFTCallback``'s business; without one in the Trainer, one with its defaults is added.
    Optimizers are built while the model is still on the host, so state that an optimizer allocates in its constructor
    never is on the device as a whole.

    Args:
        device: ``"auto"`` takes the Trainer's one device.
        accelerator: As in Lightning.
        offload: ``"host"`` keeps the optimizer state of inactive groups in host memory, ``"none"`` on the device.
        prefetch: Fetch the next group's state while the batch is computed; costs one more group's state on the device.
        pin_memory: Page-locked host memory, without which copies to and from a GPU block the host.
        master_weights: ``"auto"``: none, which is exact in 32 bits and in mixed precision.
        checkpoint_io: As in Lightning; default: ``StreamingCheckpointIO``.
        precision_plugin: As in Lightning.

    Raises:
        ValueError: ``offload`` or ``master_weights`` is unknown.
    """

    strategy_name = "hift"

    def __init__(
        self,
        device: str = "auto",
        accelerator: Accelerator | None = None,
        offload: Offload = "host",
        prefetch: bool = True,
        pin_memory: bool = True,
        master_weights: Literal["auto", "none"] = "auto",
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            "cpu" if device == "auto" else device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        if master_weights not in ("auto", "none"):
            raise ValueError(f"Got master_weights={master_weights!r}; choose 'auto' or 'none'.")
        StateOffloader("cpu", offload)  # refuses an unknown tier now rather than in fit
        self.offload: Offload = offload
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.master_weights = master_weights
        self._device_is_auto = device == "auto"
        self._hift: HiFTCallback | None = None

    @property
    def parallel_devices(self) -> list[torch.device]:
        """Always empty, so that the Trainer hands over the devices it has chosen."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise MisconfigurationException(
                f"strategy='hift' trains on one device, got {len(devices)}. Use Trainer(devices=1)."
            )
        if devices and self._device_is_auto:
            self._root_device = devices[0]

    def make_offloader(self) -> StateOffloader:
        """A keeper for the state of one optimizer, as this strategy was told to keep it."""
        return StateOffloader(self.root_device, self.offload, self.prefetch, self.pin_memory)

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        callbacks = model.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, HiFTCallback) for callback in callbacks):
            callbacks.insert(0, HiFTCallback())

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._warn_about_half_precision()
            self.setup_optimizers(trainer)
            self._hift = self._callback(trainer)
            self._hift.attach(trainer)
        self.model_to_device()
        self.model = self._setup_model(self.model)
        self.setup_precision_plugin()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for engine in self._engines_without_callback():
            engine.activate()

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        for engine in self._engines_without_callback():
            if engine.optimizer is optimizer:
                engine.announce_step()
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def _engines_without_callback(self) -> Sequence[HiFTEngine]:
        """Engines that no callback drives: the learning-rate finder takes all callbacks out for a while."""
        assert self.lightning_module is not None
        if self._hift is None or self._hift in self.lightning_module.trainer.callbacks:  # type: ignore[attr-defined]
            return ()
        return self._hift.engines

    def _callback(self, trainer: pl.Trainer) -> HiFTCallback:
        return next(c for c in trainer.callbacks if isinstance(c, HiFTCallback))  # type: ignore[attr-defined]

    def _warn_about_half_precision(self) -> None:
        if self.master_weights == "auto" and isinstance(self.precision_plugin, HalfPrecision):
            rank_zero_warn(
                f"precision={self.precision_plugin.precision!r} rounds each update to 16 bits; small updates are lost."
                " Use '32-true' or 'bf16-mixed', or master_weights='none' to silence this."
            )
