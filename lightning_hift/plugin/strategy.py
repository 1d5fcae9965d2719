"""``strategy="hift"``: one device, with the optimizer state of inactive groups elsewhere."""

from __future__ import annotations

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_hift.engine.options import HiFTOptions
from lightning_hift.offload.offloader import Offload
from lightning_hift.plugin.offloading import OffloadingStrategy
from lightning_hift.precision.master_weights import MasterWeights


class HiFTStrategy(OffloadingStrategy, SingleDeviceStrategy):
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
        offload: Offload = HiFTOptions.offload,
        offload_directory: str | None = None,
        prefetch: bool = HiFTOptions.prefetch,
        pin_memory: bool = HiFTOptions.pin_memory,
        master_weights: MasterWeights = HiFTOptions.master_weights,
        max_group_numel: int | None = HiFTOptions.max_group_numel,
        activation_budget: str | int | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            HiFTOptions(
                offload=offload,
                offload_directory=offload_directory,
                prefetch=prefetch,
                pin_memory=pin_memory,
                master_weights=master_weights,
                max_group_numel=max_group_numel,
            ),
            activation_budget,
            device="cpu" if device == "auto" else device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self._device_is_auto = device == "auto"

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
