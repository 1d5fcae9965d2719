"""``strategy="hift_ddp"``: data parallel, with the gradients of the active group alone going over the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.distributed.agreement import check_identical
from lightning_hift.distributed.gradient_sync import GradientSync
from lightning_hift.distributed.several_processes import SeveralProcesses
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.engine.state_partition import StatePartition
from lightning_hift.offload.offloader import Offload
from lightning_hift.plugin.callback import HiFTCallback
from lightning_hift.precision.master_weights import MasterWeights


class HiFTDDPStrategy(SeveralProcesses, DDPStrategy):
    """Trains on several devices, each with all weights and a share of each batch, as ``HiFTStrategy`` does on one.

    Weights and buffers are those of the first process at the start. At each step the gradients of the active group, and
    of no others, are averaged while the backward pass goes on; a parameter that a process has not used counts as one
    with a gradient of zeros. With accumulation that happens once per optimizer step. Buffers (statistics of batch
    norms), but for masks of booleans, are those of the first process at the start of each batch. There is no
    ``DistributedDataParallel`` around the module.

    With ``partition_state`` each process keeps and steps its part of the optimizer state and the masters alone, which
    divides the host memory for them, and the time of the optimizer, by about the number of processes. Then the new
    weights of the active group go over the network, too. Checkpoints stay the same: the first process gathers the
    state, in memory-mapped files in the Trainer's ``default_root_dir``, so all processes have to save together.

    Args:
        offload: See ``HiFTStrategy``, as for all up to ``activation_budget``.
        offload_directory: On each host.
        prefetch: .
        pin_memory: .
        master_weights: .
        max_group_numel: .
        activation_budget: For each process.
        check_every_n_steps: Compare the weights of all processes every so many optimizer steps, which waits for the
            device, and stop if they differ; 0 never does.
        partition_state: Divide optimizer state and masters among the processes: tensor by tensor, so that the largest
            one decides how evenly (``max_group_numel`` cuts it). For optimizers that step each parameter by itself.
        timeout: Processes that wait longer for another one give up.
        process_group_backend: As in Lightning's ``DDPStrategy``, as for all that follow.
        start_method: .
        accelerator: .
        parallel_devices: .
        cluster_environment: .
        checkpoint_io: .
        precision_plugin: .

    Raises:
        ValueError: As ``HiFTStrategy``, or ``check_every_n_steps`` is below 0.
        TypeError: In ``fit``: with ``partition_state``, the optimizer does not step each parameter by itself.
        MisconfigurationException: There are to be other processes than torchrun has started.
        RuntimeError: In ``fit``: processes run different code or configurations, or their weights have come apart.
    """

    strategy_name = "hift_ddp"

    def __init__(
        self,
        offload: Offload = HiFTOptions.offload,
        offload_directory: str | None = None,
        prefetch: bool = HiFTOptions.prefetch,
        pin_memory: bool = HiFTOptions.pin_memory,
        master_weights: MasterWeights = HiFTOptions.master_weights,
        max_group_numel: int | None = HiFTOptions.max_group_numel,
        activation_budget: str | int | None = None,
        check_every_n_steps: int = 100,
        partition_state: bool = False,
        timeout: timedelta = timedelta(minutes=10),
        process_group_backend: str | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        if check_every_n_steps < 0:
            raise ValueError(f"Got check_every_n_steps={check_every_n_steps}; it must be at least 1, or 0 for never.")
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
            timeout=timeout,
            process_group_backend=process_group_backend,
            start_method=start_method,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.check_every_n_steps = check_every_n_steps
        self.partition_state = partition_state
        self._partition: StatePartition | None = None
        self._host_group: dist.ProcessGroup | None = None  # None: the default one
        self._sync: GradientSync | None = None

    @property
    def sent_bytes(self) -> int:
        """Bytes that this process has sent at this step: gradients to be summed up, and weights that it has stepped."""
        return sum(each.sent_bytes for each in (self._sync, self._partition) if each is not None)

    @property
    @override
    def num_parts(self) -> int:
        return self.world_size if self.partition_state else 1

    @property
    @override
    def engine_options(self) -> dict[str, Any]:
        return super().engine_options | {"partition": self._partition}

    @override
    def _setup_model(self, model: Module) -> Module:  # type: ignore[override]  # no wrapper around it
        return model

    @override
    def share_weights(self) -> None:
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self.take_from_first(tensor.detach())
        if self.partition_state:
            self._partition = StatePartition()
            if self._host_group is None and dist.get_backend() != "gloo":
                self._host_group = dist.new_group(backend="gloo", timeout=self._timeout)

    @override
    def on_attach(self, callback: HiFTCallback) -> None:
        super().on_attach(callback)
        self._close()
        self._sync = GradientSync([p for engine in callback.engines for p in engine.parameters.values()])

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        assert self._hift is not None
        assert self._sync is not None
        self._sync.begin([p for engine in self._hift.engines for p in engine.active_parameters])
        if self._partition is not None:
            self._partition.sent_bytes = 0
        self._share_buffers()

    @override
    def backward_pass(self) -> AbstractContextManager[None]:
        assert self._sync is not None
        return self._sync.backward_pass()

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients are not averaged by backward passes in this context, but with those of the next one after it."""
        assert self._sync is not None
        with self._sync.blocked():
            yield

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, *args, **kwargs)
        engines = () if self._hift is None else self._hift.engines
        for engine in (each for each in engines if each.optimizer is optimizer):
            if self.check_every_n_steps and engine.step % self.check_every_n_steps == 0:
                check_identical(engine.parameters, engine.step)
        return result

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        engines = () if self._hift is None else self._hift.engines
        engine = next((each for each in engines if each.optimizer is _bare(optimizer)), None)
        if self._partition is None or engine is None:
            # The state of the others is the same, and they write no file.
            return super().optimizer_state(optimizer) if self.is_global_zero else {}
        assert self.lightning_module is not None
        with engine.gathered(self.lightning_module.trainer.default_root_dir, self._host_group):
            return super().optimizer_state(optimizer) if self.is_global_zero else {}

    @override
    def teardown(self) -> None:
        self._close()
        super().teardown()

    def _close(self) -> None:
        if self._sync is not None:
            self._sync.close()
            self._sync = None

    def _share_buffers(self) -> None:
        assert self.lightning_module is not None
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.lightning_module.buffers():
            if buffer.dtype != torch.bool and buffer.numel():
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        for buffers in by_dtype.values():
            together = torch.cat([buffer.reshape(-1).to(self.root_device) for buffer in buffers])
            dist.broadcast(together, 0)
            if self.global_rank:
                parts = cast(Any, together).split([buffer.numel() for buffer in buffers])
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer.copy_(part.view_as(buffer))


def _bare(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
