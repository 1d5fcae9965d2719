"""HiFT for PyTorch Lightning: fine-tune all parameters of a model, one layer group at a time."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_hift.attach import attach_engines
from lightning_hift.checkpointing import ActivationBudget
from lightning_hift.drawn_blocks import IST, LISA
from lightning_hift.engine import HiFTEngine
from lightning_hift.grouping import LayerGroup, LayerUnit, find_layer_units, group_units
from lightning_hift.lr_scheduler import SweepLR
from lightning_hift.mezo import MeZO
from lightning_hift.offload import StateOffloader
from lightning_hift.policies import HFT, BAdam
from lightning_hift.registration import register_strategies
from lightning_hift.schedule import SweepSchedule
from lightning_hift.selection import SelectionPolicy

if TYPE_CHECKING:
    from lightning_hift.callback import HiFTCallback
    from lightning_hift.checkpoint_io import StreamingCheckpointIO
    from lightning_hift.cli import HiFTCLI
    from lightning_hift.ddp_strategy import HiFTDDPStrategy
    from lightning_hift.fsdp_strategy import HiFTFSDPStrategy
    from lightning_hift.layer_updates import LayerUpdates
    from lightning_hift.module import HiFTModule
    from lightning_hift.planner.plan import make_plan
    from lightning_hift.precision import HiFTPrecision
    from lightning_hift.predictions import PredictionWriter
    from lightning_hift.strategy import HiFTStrategy
    from lightning_hift.trainable import TrainOnly
    from lightning_hift.training_speed import TrainingSpeed

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
    "HiFTModule",
    "HiFTPrecision",
    "HiFTStrategy",
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

# Imported on first use: a plain torch loop needs no Lightning, which also brings in torchmetrics and transformers.
_NEEDS_LIGHTNING = {
    "HiFTCLI": "cli",
    "HiFTCallback": "callback",
    "HiFTDDPStrategy": "ddp_strategy",
    "HiFTFSDPStrategy": "fsdp_strategy",
    "HiFTModule": "module",
    "HiFTPrecision": "precision",
    "HiFTStrategy": "strategy",
    "LayerUpdates": "layer_updates",
    "PredictionWriter": "predictions",
    "StreamingCheckpointIO": "checkpoint_io",
    "TrainOnly": "trainable",
    "TrainingSpeed": "training_speed",
    "make_plan": "planner.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_LIGHTNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEEDS_LIGHTNING[name]}"), name)


register_strategies()
