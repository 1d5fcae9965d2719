"""``Fabric(strategy="hift")``: the user's own loop on one device, one layer group at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.precision import HalfPrecision, Precision
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.nn import Module, ModuleDict
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.engine.engine import HiFTEngine, attach_engines
from lightning_hift.engine.optimizer_state import parameters_of
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.engine.output_graph import OutputGraph
from lightning_hift.engine.run_words import summarize_run, tell_first_sweep
from lightning_hift.engine.sweep_lr import HoldLR, SweepLR, check_hold_lr
from lightning_hift.fabric.precision import FabricMasterPrecision
from lightning_hift.offload.offloader import StateOffloader
from lightning_hift.plugin.checkpoint_io import StreamingCheckpointIO
from lightning_hift.plugin.page_lock_bar import PageLockBar


class HiFTFabricStrategy(SingleDeviceStrategy):
    """Trains what ``fabric.setup`` gets with HiFT; the loop stays as it is::

        fabric = Fabric(strategy=HiFTFabricStrategy(group_size=2))  # the only change
        model, optimizer = fabric.setup(model, optimizer)

    Each call of ``optimizer.step()`` hands over to the next layer group. A scheduler that is given to ``fabric.setup``
    comes back as a ``SweepLR``; one that is not is left alone. The optimizer's state holds the position in the sweep,
    so ``fabric.save`` and ``fabric.load`` need nothing else. Random state is the user's own to save, as ever in Fabric.

    Args:
        device: ``"auto"`` takes Fabric's one device.
        accelerator: As in Fabric.
        checkpoint_io: As in Fabric; default: ``StreamingCheckpointIO``.
        precision: As in Fabric.
        hold_lr: See ``HiFTCallback``.
        options: Those of ``HiFTOptions``: what trains when, and where its state lives. The seed's default is that of
            ``seed_everything``, or 0.

    Raises:
        ValueError: An option is out of range.
        TypeError: An option does not exist.
    """

    def __init__(
        self,
        device: str | torch.device = "auto",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        hold_lr: HoldLR = "replay",
        **options: Any,
    ) -> None:
        check_hold_lr(hold_lr)
        self.hold_lr: HoldLR = hold_lr
        self.options = HiFTOptions(**options)
        self.engines: list[HiFTEngine] = []
        """One for each optimizer, in the order in which they were set up."""
        self._modules: list[Module] = []  # those that may still get an optimizer
        self._takes_seed = "seed" not in options
        self._device_is_auto = device == "auto"
        super().__init__("cpu" if device == "auto" else device, accelerator, checkpoint_io, precision)

    # --- what Fabric's connector hands over ---------------------------------------------------------------------------

    @property
    def parallel_devices(self) -> list[torch.device]:
        """Always empty, so that Fabric hands over the devices it has chosen."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        self._refuse_several("devices", len(devices))
        if self._device_is_auto:
            self._root_device = devices[0]

    num_nodes = 1

    @property
    def _num_nodes(self) -> int:
        return 1

    @_num_nodes.setter
    def _num_nodes(self, num_nodes: int) -> None:
        self._refuse_several("num_nodes", num_nodes)

    def _refuse_several(self, name: str, count: int) -> None:
        if count > 1:
            raise ValueError(
                f"HiFT in Fabric trains on one device, got {name}={count}. Use Fabric({name}=1), or a Trainer with"
                " strategy='hift_ddp' or 'hift_fsdp'."
            )

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """By default one that needs no second copy in memory, and leaves whole files only."""
        self._checkpoint_io = self._checkpoint_io or StreamingCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @property
    def precision(self) -> Precision:
        """Fabric's; for weights in 16 bits one that lets masters be taken from them first."""
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if type(precision) is HalfPrecision and self.options.master_weights != "none":
            precision = FabricMasterPrecision(precision.precision)
        self._precision = precision

    # --- fabric.setup -------------------------------------------------------------------------------------------------

    @override
    def module_to_device(self, module: Module) -> None:
        precision = self.precision
        if not (isinstance(precision, FabricMasterPrecision) and precision.delays_move(module, self.root_device)):
            super().module_to_device(module)

    @override
    def setup_module_and_optimizers(
        self, module: Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[Module, list[Optimizer], Any]:
        engines = self._attach(module, [module], optimizers)
        if scheduler is not None:
            owner = next((each for each in engines if each.optimizer is scheduler.optimizer), None)
            if owner is None:
                raise ValueError(
                    f"{type(scheduler).__name__} is not a scheduler of the optimizers that fabric.setup got with it."
                    " Give it to the call that sets up its optimizer."
                )
            scheduler = SweepLR(scheduler, owner, self.hold_lr)
        return module, optimizers, scheduler

    @override
    def setup_module(self, module: Module) -> Module:
        self._modules.append(module)
        return module

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        owned = set(parameters_of(optimizer))
        modules = [module for module in self._modules if not owned.isdisjoint(module.parameters())]
        if not modules:
            raise RuntimeError(
                f"{type(optimizer).__name__} has no parameters of a module that was set up, so HiFT finds no layers."
                " Set up the module first, with fabric.setup_module, or both in one call of fabric.setup."
            )
        whole = modules[0] if len(modules) == 1 else ModuleDict({str(i): each for i, each in enumerate(modules)})
        self._attach(whole, modules, [optimizer])
        return optimizer

    def _attach(self, whole: Module, modules: Sequence[Module], optimizers: Sequence[Optimizer]) -> list[HiFTEngine]:
        options, precision = self.options, self.precision
        if self._takes_seed:
            options = replace(options, seed=int(os.environ.get("PL_GLOBAL_SEED", 0)))
        attach = partial(
            attach_engines, whole, optimizers, options, make_offloader=self._make_offloader, advance_on_step=False
        )
        if isinstance(precision, FabricMasterPrecision):
            engines = attach(weights_dtype=precision.weights_dtype)
            for module in modules:
                precision.finish(module)
            for engine in engines:
                precision.watch(engine)
        else:
            engines = attach()
        for engine in engines:
            engine.start()
            for module in modules:
                engine.on_close.append(module.register_forward_hook(OutputGraph(module)).remove)
        self.engines += engines
        rank_zero_info(summarize_run(whole, engines, math.inf))
        return engines

    def _make_offloader(self) -> StateOffloader:
        return self.options.make_offloader(self.root_device, show_progress=PageLockBar())

    # --- optimizer.step -----------------------------------------------------------------------------------------------

    @override
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, **kwargs)
        engine: HiFTEngine | None = getattr(optimizer, "_hift_engine", None)
        if engine is not None:
            tell_first_sweep(engine, rank_zero_info, rank_zero_warn)
        return output
