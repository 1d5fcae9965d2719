"""HiFT for PyTorch Lightning: fine-tune all parameters of a model, one layer group at a time."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_hift.activations.checkpointing import ActivationBudget
from lightning_hift.engine.engine import HiFTEngine, attach_engines
from lightning_hift.engine.mezo import MeZO
from lightning_hift.engine.sweep_lr import SweepLR
from lightning_hift.groups.drawn_blocks import IST, LISA
from lightning_hift.groups.grouping import LayerGroup, LayerUnit, find_layer_units, group_units
from lightning_hift.groups.policies import HFT, BAdam
from lightning_hift.groups.schedule import SweepSchedule
from lightning_hift.groups.selection import SelectionPolicy
from lightning_hift.offload.offloader import StateOffloader
from lightning_hift.plugin.registration import register_strategies

if TYPE_CHECKING:
    from lightning_hift.cli import HiFTCLI
    from lightning_hift.distributed.ddp_strategy import HiFTDDPStrategy
    from lightning_hift.distributed.fsdp_strategy import HiFTFSDPStrategy
    from lightning_hift.fabric.strategy import HiFTFabricStrategy
    from lightning_hift.huggingface.trainer import HiFTTrainerMixin
    from lightning_hift.planner.plan import make_plan
    from lightning_hift.plugin.callback import HiFTCallback
    from lightning_hift.plugin.checkpoint_io import StreamingCheckpointIO
    from lightning_hift.plugin.layer_updates import LayerUpdates
    from lightning_hift.plugin.module import HiFTModule
    from lightning_hift.plugin.precision import HiFTPrecision
    from lightning_hift.plugin.predictions import PredictionWriter
    from lightning_hift.plugin.strategy import HiFTStrategy
    from lightning_hift.plugin.trainable import TrainOnly
    from lightning_hift.plugin.training_speed import TrainingSpeed

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  # as Python sorts, capitals first
    "ActivationBudget",
    "BAdam",
    "HFT",
    "HiFTCLI",
    "HiFTCallback",
    "HiFTDDPStrategy",
    "HiFTEngine",
    "HiFTFSDPStrategy",
    "HiFTFabricStrategy",
    "HiFTModule",
    "HiFTPrecision",
    "HiFTStrategy",
    "HiFTTrainerMixin",
    "IST",
    "LISA",
    "LayerGroup",
    "LayerUnit",
    "LayerUpdates",
    "MeZO",
    "PredictionWriter",
    "SelectionPolicy",
    "StateOffloader",
    "StreamingCheckpointIO",
    "SweepLR",
    "SweepSchedule",
    "TrainOnly",
    "TrainingSpeed",
    "attach_engines",
    "find_layer_units",
    "group_units",
    "make_plan",
]

# A plain torch loop needs no planner, and no Lightning, which also brings in torchmetrics and transformers.
_ON_FIRST_USE = {
    "HiFTCLI": "cli",
    "HiFTCallback": "plugin.callback",
    "HiFTDDPStrategy": "distributed.ddp_strategy",
    "HiFTFSDPStrategy": "distributed.fsdp_strategy",
    "HiFTFabricStrategy": "fabric.strategy",
    "HiFTModule": "plugin.module",
    "HiFTPrecision": "plugin.precision",
    "HiFTStrategy": "plugin.strategy",
    "HiFTTrainerMixin": "huggingface.trainer",
    "LayerUpdates": "plugin.layer_updates",
    "PredictionWriter": "plugin.predictions",
    "StreamingCheckpointIO": "plugin.checkpoint_io",
    "TrainOnly": "plugin.trainable",
    "TrainingSpeed": "plugin.training_speed",
    "make_plan": "planner.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_FIRST_USE[name]}"), name)


register_strategies()
