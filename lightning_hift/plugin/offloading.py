"""What all strategies of HiFT share: optimizer state and master weights live on the host, and get there in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.optimizer_groups import find_groups
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.offload.offloader import StateOffloader
from lightning_hift.planner.memory import parse_bytes
from lightning_hift.planner.preflight import check_before_run
from lightning_hift.plugin.callback import HiFTCallback, find_callback, has_no_optimizer
from lightning_hift.plugin.page_lock_bar import PageLockBar
from lightning_hift.plugin.precision import HiFTPrecision


class OffloadingStrategy(Strategy):
    """To be put before a strategy of Lightning among the base classes.

    Optimizers are built while the model is still on the host, so state that an optimizer allocates in its constructor
    never is on the device as a whole.

    Args:
        options: Where state lives; what trains when is the callback's business.
        activation_budget: See ``HiFTStrategy``.
        lightning: Arguments of Lightning's strategy.

    Raises:
        ValueError: As ``HiFTStrategy``.
    """

    def __init__(self, options: HiFTOptions, activation_budget: str | int | None, **lightning: Any) -> None:
        self.options = options
        self.activation_budget = (
            None if activation_budget is None else parse_bytes(activation_budget, "activation_budget")
        )
        super().__init__(**lightning)
        self._hift: HiFTCallback | None = None

    @property
    def precision_plugin(self) -> Precision:
        """Lightning's; for weights in 16 bits one that keeps their masters."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if type(plugin) is HalfPrecision and self.options.master_weights != "none":
            plugin = HiFTPrecision(plugin.precision)
        self._precision_plugin = plugin

    @property
    def engine_options(self) -> dict[str, Any]:
        """How the engines of this strategy keep state and masters, as arguments of ``attach_engines``."""
        plugin = self.precision_plugin
        return {
            "make_offloader": self._make_offloader,
            "master_weights": self.options.master_weights,
            "weights_dtype": plugin.weights_dtype if isinstance(plugin, HiFTPrecision) else None,
            "max_group_numel": self.options.max_group_numel,
        }

    @property
    def num_parts(self) -> int:
        """Among how many processes state and masters are divided."""
        return 1

    def _make_offloader(self) -> StateOffloader:
        return self.options.make_offloader(self.root_device, show_progress=PageLockBar())

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        trainer = model._trainer  # none, or another one, where a model is connected by hand, to save or to load
        if trainer is not None and trainer.strategy is self and find_callback(trainer) is None:
            trainer.callbacks.insert(0, HiFTCallback())  # type: ignore[attr-defined]

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        plugin = self.precision_plugin
        takes_masters = isinstance(plugin, HiFTPrecision)
        if isinstance(plugin, HiFTPrecision):
            if self.options.master_weights == "none":
                raise ValueError(
                    "Got HiFTPrecision, which steps master weights, with master_weights='none'. Use another"
                    f" master_weights, or Lightning's own precision={plugin.precision!r}."
                )
            plugin.make_scaler(self.root_device)
        if not takes_masters:
            self.model = self.precision_plugin.convert_module(self.model)
        self.share_weights()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            self._hift = self._callback(trainer)
            self._hift.choose_turns(trainer)
            self._check_memory(self._hift)
            self._hift.attach(trainer)
            self.on_attach(self._hift)
        if takes_masters:  # from the weights as they were, layer by layer; only then is the rest rounded
            self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.model = self._setup_model(self.model)
        self.setup_precision_plugin()

    def share_weights(self) -> None:
        """Give all processes the same weights, before masters are taken from them. Nothing to do for one process."""

    def on_attach(self, callback: HiFTCallback) -> None:
        """The engines are there, and nothing has been trained."""

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
    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        super().pre_backward(closure_loss)
        if self._engines_without_callback() and not closure_loss.requires_grad and not closure_loss.is_inference():
            # The active group has no part in this loss, so nothing is updated. Whether it ever has one is asked in fit.
            closure_loss.requires_grad_(True)

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
        if self._hift is None:
            return ()
        assert self.lightning_module is not None
        if self._hift in self.lightning_module.trainer.callbacks:  # type: ignore[attr-defined]
            return ()
        return self._hift.engines

    def _check_memory(self, callback: HiFTCallback) -> None:
        """Before anything is allocated."""
        assert self.model is not None
        if has_no_optimizer(self):
            return
        told = check_before_run(
            self.model,
            self.optimizers,
            find_groups(self.model, self.optimizers, callback.grouping),
            self.root_device,
            offload=self.options.offload,
            directory=self.options.offload_directory,
            policy=callback.policy,
            processes=self.num_parts,
            processes_per_host=getattr(self, "num_processes", 1) or 1,  # of strategies for several devices
            **{key: self.engine_options[key] for key in ("master_weights", "weights_dtype", "max_group_numel")},
        )
        if told is not None:
            rank_zero_info(told)

    def _callback(self, trainer: pl.Trainer) -> HiFTCallback:
        callback = find_callback(trainer)
        assert callback is not None, "connect adds one"
        return callback
