"""What strategies of several processes share: how they are started, what they agree on, and whose weights they take."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.distributed.agreement import check_agreement, describe_run
from lightning_hift.plugin.callback import HiFTCallback
from lightning_hift.plugin.offloading import OffloadingStrategy


class SeveralProcesses(OffloadingStrategy, ParallelStrategy):
    """To be put before a strategy of Lightning with a process for each device; see ``OffloadingStrategy``."""

    num_nodes: int
    num_processes: int

    @override
    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        environment, count = self.cluster_environment, self.num_nodes * self.num_processes
        if isinstance(environment, TorchElasticEnvironment) and environment.world_size() != count:
            raise MisconfigurationException(
                f"Got devices={self.num_processes} and num_nodes={self.num_nodes}, which makes {count} processes, but"
                f" torchrun has started {environment.world_size()}. Pass its --nproc_per_node as devices and its"
                " --nnodes as num_nodes."
            )

    @override
    def on_attach(self, callback: HiFTCallback) -> None:
        check_agreement(describe_run(self, callback))

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning's, but with gradients that all processes have agreed on before its hooks on_after_backward.
        assert self.lightning_module is not None
        plugin = self.precision_plugin
        loss = plugin.pre_backward(closure_loss, self.lightning_module)
        with self.backward_pass():
            plugin.backward(loss, self.lightning_module, optimizer, *args, **kwargs)
        return plugin.post_backward(loss, self.lightning_module)

    @abstractmethod
    def backward_pass(self) -> AbstractContextManager[None]:
        """Around each backward pass: afterwards all processes have the same gradients, or parts of them."""

    def take_from_first(self, tensor: Tensor) -> None:
        """Give ``tensor`` the values that it has in the first process."""
        there = tensor.to(self.root_device).contiguous()  # some backends know no other memory
        dist.broadcast(there, 0)
        if there.data_ptr() != tensor.data_ptr():
            tensor.copy_(there)
