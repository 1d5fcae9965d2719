"""Makes ``strategy="hift"`` known to Lightning as soon as both are imported, in either order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_LIGHTNING = "lightning.pytorch"
_STRATEGIES = {
    "hift": ("plugin.strategy", "HiFTStrategy", "One device, one layer group at a time"),
    "hift_ddp": ("distributed.ddp_strategy", "HiFTDDPStrategy", "Data parallel, one layer group at a time"),
    "hift_fsdp": ("distributed.fsdp_strategy", "HiFTFSDPStrategy", "Sharded, one layer group at a time"),
}
_FABRIC_STRATEGIES = {"hift": ("fabric.strategy", "HiFTFabricStrategy", "One device, one layer group at a time")}


def register_strategies() -> None:
    """Register now if Lightning is there, else right after it has been imported."""
    if _LIGHTNING in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterLightning())


class _AfterLightning(MetaPathFinder, Loader):
    """Lets Lightning be imported as usual and then registers the strategies with it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _LIGHTNING:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()


def _register() -> None:
    trainers = import_module("lightning.pytorch.strategies").StrategyRegistry
    fabrics = import_module("lightning.fabric.strategies").STRATEGY_REGISTRY
    for registry, strategies in ((trainers, _STRATEGIES), (fabrics, _FABRIC_STRATEGIES)):
        for name, (module, strategy, description) in strategies.items():
            registry.register(name, partial(_make, module, strategy), description=description, override=True)


def _make(module: str, strategy: str, **options: Any) -> Any:
    # Imported here: the strategy's own import may be what has just brought in Lightning.
    return getattr(import_module(f"lightning_hift.{module}"), strategy)(**options)
