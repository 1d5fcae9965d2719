"""HiFT for PyTorch Lightning: fine-tune all parameters of a model, one layer group at a time."""

from lightning_hift.callback import HiFTCallback
from lightning_hift.checkpoint_io import StreamingCheckpointIO
from lightning_hift.engine import HiFTEngine, attach_engines
from lightning_hift.grouping import LayerGroup, LayerUnit, find_layer_units, group_units
from lightning_hift.lr_scheduler import SweepLR
from lightning_hift.module import HiFTModule
from lightning_hift.offload import StateOffloader
from lightning_hift.schedule import SweepSchedule
from lightning_hift.strategy import HiFTStrategy

__version__ = "0.1.0"

__all__ = [
    "HiFTCallback",
    "HiFTEngine",
    "HiFTModule",
    "HiFTStrategy",
    "LayerGroup",
    "LayerUnit",
    "StateOffloader",
    "StreamingCheckpointIO",
    "SweepLR",
    "SweepSchedule",
    "attach_engines",
    "find_layer_units",
    "group_units",
]
