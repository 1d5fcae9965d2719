"""Weights in 16 bits with masters in 32, in Fabric: modules wait in 32 bits until their masters were taken."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from lightning.fabric.plugins.precision import HalfPrecision
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.engine.engine import HiFTEngine


class FabricMasterPrecision(HalfPrecision):
    """Fabric's 16-bit precision, but each update is made in 32 bits, on the active group's master weights.

    ``HiFTFabricStrategy`` takes it by itself. As in Fabric, nothing scales the loss of ``"16-true"``.

    Args:
        precision: ``"bf16-true"`` or ``"16-true"``.
    """

    def __init__(self, precision: str) -> None:
        super().__init__(cast(Any, precision))
        self._waiting: dict[Module, torch.device | None] = {}  # and where each is to go
        self._versions: dict[HiFTEngine, dict[Parameter, int]] = {}  # of weights that were not stepped yet

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the weights outside their step."""
        return self._desired_input_dtype

    @override
    def convert_module(self, module: Module) -> Module:
        self._waiting[module] = None
        return module

    def delays_move(self, module: Module, device: torch.device) -> bool:
        """Whether ``module`` waits, and will be moved when it is rounded: in 32 bits it may not fit on the device."""
        if module in self._waiting:
            self._waiting[module] = device
        return module in self._waiting

    def finish(self, module: Module) -> None:
        """Round and move a module that waits, as masters were taken from all of it that trains."""
        if module in self._waiting:
            module.to(device=self._waiting.pop(module), dtype=self.weights_dtype)

    def watch(self, engine: HiFTEngine) -> None:
        """Until the first step, let whatever is loaded into the weights be their masters, too."""
        self._versions[engine] = {p: p._version for p in engine.parameters.values()}

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        return torch.device("cpu")  # in 32 bits

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        for module in list(self._waiting):  # it is used without having got an optimizer
            self.finish(module)
        for engine, versions in list(self._versions.items()):
            if engine.step > 0:
                del self._versions[engine]
            elif loaded := [p for p, version in versions.items() if p._version != version]:
                engine.retake_masters(loaded)
                self.watch(engine)
        return super().forward_context()

    @override
    def unscale_gradients(self, optimizer: Optimizer) -> None:
        # Here Fabric begins to clip. The weights stay as they are: the step may be left out.
        engine: HiFTEngine | None = getattr(optimizer, "_hift_engine", None)
        if engine is not None:
            engine.raise_gradients()
