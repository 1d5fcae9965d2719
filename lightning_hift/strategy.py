"""``strategy="hift"``: one device, with the optimizer state of inactive groups elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.attach import find_groups
from lightning_hift.callback import HiFTCallback, find_callback
from lightning_hift.engine import HiFTEngine
from lightning_hift.master_weights import MasterWeights, check_master_weights
from lightning_hift.memory import parse_bytes
from lightning_hift.offload import Offload, StateOffloader, check_offload
from lightning_hift.precision import HiFTPrecision
from lightning_hift.preflight import check_before_run


class HiFTStrategy(SingleDeviceStrategy):
    """Trains on one device with HiFT; says where optimizer state lives and how it moves.

    What trains when is the ``HiFTCallback``'s business; without one in the Trainer, one with its defaults is added.
    Optimizers are built while the model is still on the host, so state that an optimizer allocates in its constructor
    never is on the device as a whole.

    Args:
        device: ``"auto"`` takes the Trainer's one device.
        accelerator: As in Lightning.
        offload: ``"host"`` keeps optimizer state of inactive groups in host memory, ``"disk"`` in memory-mapped
            files (some thousand tokens per step hide the disk, and it wears: see ``lightning-hift plan``), ``"none"``
            on the device.
        offload_directory: For ``"disk"``: an existing directory on a fast disk. The files are deleted after ``fit``.
        prefetch: Fetch the next group's state while the batch is computed. Without it each step waits for its copies,
            but the state does not take device memory beside the activations.
        pin_memory: Page-locked host memory, without which copies to and from a GPU are slow.
        master_weights: With ``precision="bf16-true"`` or ``"16-true"``: ``"full"`` keeps float32 masters on the host (4
            bytes a parameter), ``"split"`` only what bfloat16 weights lack of them (2 bytes, the same result),
            ``"none"`` rounds every update to 16 bits. ``"auto"``: ``"split"`` for bfloat16, ``"full"`` for float16.
        max_group_numel: Step larger layer groups in slices of so many elements, so that a huge embedding does not
            decide how much state the device must hold. For element-wise optimizers such as AdamW.
        activation_budget: The most that may be held for the backward pass, such as ``"6GiB"`` or a number of bytes: as
            many blocks are recomputed as the active group demands. See ``ActivationBudget``.
        checkpoint_io: As in Lightning; default: ``StreamingCheckpointIO``.
        precision_plugin: As in Lightning.

    Raises:
        ValueError: ``offload`` or ``master_weights`` is unknown; ``offload_directory`` is missing, or given in vain;
            ``activation_budget`` is no size; ``max_group_numel`` is below 1.
    """

    strategy_name = "hift"

    def __init__(
        self,
        device: str = "auto",
        accelerator: Accelerator | None = None,
        offload: Offload = "host",
        offload_directory: str | None = None,
        prefetch: bool = True,
        pin_memory: bool = True,
        master_weights: MasterWeights = "auto",
        max_group_numel: int | None = None,
        activation_budget: str | int | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        check_offload(offload, offload_directory)
        check_master_weights(master_weights)
        if max_group_numel is not None and max_group_numel < 1:
            raise ValueError(f"Got max_group_numel={max_group_numel}; it must be at least 1, or None to slice nothing.")
        self.offload: Offload = offload
        self.offload_directory = offload_directory
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.master_weights: MasterWeights = master_weights
        self.max_group_numel = max_group_numel
        self.activation_budget = (
            None if activation_budget is None else parse_bytes(activation_budget, "activation_budget")
        )
        super().__init__(
            "cpu" if device == "auto" else device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
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

    @property
    def precision_plugin(self) -> Precision:
        """Lightning's; for weights in 16 bits one that keeps their masters."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if type(plugin) is HalfPrecision and self.master_weights != "none":
            plugin = HiFTPrecision(plugin.precision)
        self._precision_plugin = plugin

    @property
    def engine_options(self) -> dict[str, Any]:
        """How the engines of this strategy keep state and masters, as arguments of ``attach_engines``."""
        plugin = self.precision_plugin
        return {
            "make_offloader": self._make_offloader,
            "master_weights": self.master_weights,
            "weights_dtype": plugin.weights_dtype if isinstance(plugin, HiFTPrecision) else None,
            "max_group_numel": self.max_group_numel,
        }

    def _make_offloader(self) -> StateOffloader:
        return StateOffloader(self.root_device, self.offload, self.prefetch, self.pin_memory, self.offload_directory)

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        if find_callback(model.trainer) is None:
            model.trainer.callbacks.insert(0, HiFTCallback())  # type: ignore[attr-defined]

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        plugin = self.precision_plugin
        takes_masters = isinstance(plugin, HiFTPrecision)
        if isinstance(plugin, HiFTPrecision):
            if self.master_weights == "none":
                raise ValueError(
                    "Got HiFTPrecision, which steps master weights, with master_weights='none'. Use another"
                    f" master_weights, or Lightning's own precision={plugin.precision!r}."
                )
            plugin.make_scaler(self.root_device)
        if not takes_masters:
            self.model = self.precision_plugin.convert_module(self.model)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            self._hift = self._callback(trainer)
            self._check_memory(self._hift)
            self._hift.attach(trainer)
        if takes_masters:  # from the weights as they were, layer by layer; only then is the rest rounded
            self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.model = self._setup_model(self.model)
        self.setup_precision_plugin()

    @override
    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        # On the host: the whole model in 32 bits, or all state of a new optimizer, may not fit on the device.
        with torch.device("cpu"), self.precision_plugin.tensor_init_context():
            yield

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

    def _check_memory(self, callback: HiFTCallback) -> None:
        """Before anything is allocated."""
        assert self.model is not None
        if any(isinstance(optimizer, _MockOptimizer) for optimizer in self.optimizers):
            return
        told = check_before_run(
            self.model,
            self.optimizers,
            find_groups(self.model, self.optimizers, **callback.grouping),
            self.root_device,
            offload=self.offload,
            directory=self.offload_directory,
            policy=callback.policy,
            **{key: value for key, value in self.engine_options.items() if key != "make_offloader"},
        )
        if told is not None:
            rank_zero_info(told)

    def _callback(self, trainer: pl.Trainer) -> HiFTCallback:
        callback = find_callback(trainer)
        assert callback is not None, "connect adds one"
        return callback
