"""What a Trainer cannot have beside HiFT, told before anything is trained."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from lightning.pytorch.strategies import SingleDeviceStrategy, SingleDeviceXLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_trainer(trainer: pl.Trainer, own: type[Callback]) -> None:
    """Refuse what would train other parameters than HiFT says, now or in a later epoch.

    Args:
        trainer: With all its callbacks.
        own: The class of HiFT's callback, of which there must be one.

    Raises:
        MisconfigurationException: As said.
    """
    callbacks = cast(Any, trainer).callbacks
    if sum(isinstance(callback, own) for callback in callbacks) > 1:
        raise MisconfigurationException(f"Got more than one {own.__name__}; a Trainer takes one.")
    for callback in callbacks:
        if isinstance(callback, BaseFinetuning):
            raise MisconfigurationException(
                f"{type(callback).__name__} freezes layers and adds them to the optimizer at a later epoch, when HiFT"
                " has put all parameters into layer groups. Take it out: with HiFT all layers train in the memory of"
                " one group from the start. To train the head alone at first, call fit with TrainOnly(['head']) among"
                " the callbacks, and then fit again without it."
            )
    strategy = trainer.strategy
    on_one_device = isinstance(strategy, SingleDeviceStrategy) and not isinstance(strategy, SingleDeviceXLAStrategy)
    if not on_one_device and not hasattr(strategy, "engine_options"):
        raise MisconfigurationException(
            f"HiFTCallback does not work with {type(strategy).__name__}: it would train the wrong parameters, or"
            " reduce gradients that do not exist, without an error. Use strategy='hift' on one device and"
            " strategy='hift_ddp' on several, or 'hift_fsdp' if the weights do not fit on one."
        )
