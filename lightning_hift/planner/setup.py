"""The choices of a run that decide what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lightning_hift.engine.options import HiFTOptions
from lightning_hift.groups.grouping import GroupSize, check_group_size
from lightning_hift.offload.offloader import Offload
from lightning_hift.planner.workload import parse_precision
from lightning_hift.precision.master_weights import MasterWeights, resolve_master_weights

Strategy = Literal["hift", "hift_ddp", "hift_fsdp"]


@dataclass(frozen=True)
class Setup:
    """The choices of a run that decide what it needs; names and defaults as in the callback and the strategy.

    Args:
        precision: Lightning's name of the precision.
        group_size: Layer units per group, or ``"balanced"``. At the number of units or above, this is full fine-tuning.
        offload: Where the optimizer state of inactive groups is.
        prefetch: Whether the next group's state is on the device beside the activations.
        master_weights: What is kept beside 16-bit weights.
        max_group_numel: Elements above which a group is stepped in slices.
        activation_budget: Bytes that may be held for the backward pass.
        batch_size: Rows per micro-batch, on each device.
        sequence_length: Tokens per row.
        eight_bit: Take optimizer state to be two 8-bit moments in blocks of 256, whatever the optimizer.
        strategy: How several devices share the run: ``"hift_ddp"`` keeps all weights on each, ``"hift_fsdp"`` shards
            weights, gradients, state and masters. ``"hift"`` is for one device; on one, all three are planned alike.
        devices: In all, on all hosts, with a process for each.
        hosts: That share them, as many each.
        partition_state: With ``"hift_ddp"``: the devices divide state and masters, tensor by tensor or slice by slice;
            each steps what it keeps, and broadcasts the new weights.

    Raises:
        ValueError: One of them is out of range, or they do not go together.
    """

    precision: str = "32-true"
    group_size: GroupSize = HiFTOptions().turns.group_size
    offload: Offload = HiFTOptions.offload
    prefetch: bool = HiFTOptions.prefetch
    master_weights: MasterWeights = HiFTOptions.master_weights
    max_group_numel: int | None = HiFTOptions.max_group_numel
    activation_budget: int | None = None
    batch_size: int = 1
    sequence_length: int = 512
    eight_bit: bool = False
    strategy: Strategy = "hift"
    devices: int = 1
    hosts: int = 1
    partition_state: bool = False

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        for name in ("batch_size", "sequence_length", "max_group_numel", "activation_budget", "devices", "hosts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Got {name}={value}; it must be at least 1.")
        if self.offload not in get_args(Offload):
            raise ValueError(f"Got offload={self.offload!r}; choose 'host', 'disk' or 'none'.")
        self._check_devices()
        name, dtype, _ = parse_precision(self.precision)
        object.__setattr__(self, "precision", name)
        object.__setattr__(self, "master_weights", resolve_master_weights(self.master_weights, {dtype}))

    def _check_devices(self) -> None:
        known = ", ".join(map(repr, get_args(Strategy)))
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"Got strategy={self.strategy!r}; the planner knows {known}.")
        if self.devices % self.hosts:
            raise ValueError(
                f"Got devices={self.devices}, in all, with hosts={self.hosts}; each host must have as many. Use a"
                f" multiple of {self.hosts}, or other hosts."
            )
        if self.strategy == "hift" and self.devices > 1:
            raise ValueError(
                f"Got strategy='hift', which trains on one device, with devices={self.devices}. Use 'hift_ddp' or"
                " 'hift_fsdp'."
            )
        if self.strategy != "hift_ddp" and self.partition_state:
            raise ValueError(
                f"Got partition_state=True with strategy={self.strategy!r}; it is for 'hift_ddp', and"
                " 'hift_fsdp' shards the state anyway. Drop one."
            )

    @property
    def processes_per_host(self) -> int:
        """One for each device."""
        return self.devices // self.hosts

    @property
    def is_sharded(self) -> bool:
        """Whether each device holds a part of the weights only."""
        return self.strategy == "hift_fsdp" and self.devices > 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights on the device."""
        return parse_precision(self.precision)[1]

    @property
    def stepped_dtype(self) -> torch.dtype:
        """Of what the optimizer steps: the masters, or the weights themselves."""
        return self.dtype if self.master_weights == "none" else torch.float32
