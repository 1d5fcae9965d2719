"""``strategy="hift_fsdp"``: weights, gradients, optimizer state and masters sharded over several devices."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.distributed.agreement import check_batch_counts
from lightning_hift.distributed.gradient_use import GradientUse
from lightning_hift.distributed.several_processes import SeveralProcesses
from lightning_hift.distributed.sharded_checkpoint import (
    is_sharded_checkpoint,
    load_callback_states,
    load_sharded,
    save_sharded,
)
from lightning_hift.distributed.sharding import BackwardPrefetch, is_sharded_module, look_at_dtypes, reshard, shard
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.engine.state_partition import ShardedState
from lightning_hift.offload.offloader import Offload
from lightning_hift.offload.sharded_tensors import as_sharded, local_part
from lightning_hift.plugin.callback import HiFTCallback
from lightning_hift.precision.master_weights import MasterWeights


class HiFTFSDPStrategy(SeveralProcesses, ModelParallelStrategy):
    """Trains on several devices, each with a part of the weights, gradients, optimizer state and masters.

    Weights are those of the first process at the start. torch's ``fully_shard`` (FSDP2) is applied to each block that
    is a layer unit, and to the rest as a whole; a module that has done so in ``configure_model`` is left as it is. Each
    process keeps and steps the state of its part, so optimizers have to be element-wise, such as AdamW. All processes
    must run the same blocks in the same order, on as many batches. Within a block they may use different parameters,
    such as experts; those that none of them uses have no gradient, as in one process.

    Checkpoints are folders to which each process writes its part (``torch.distributed.checkpoint``). They are whole or
    absent, can be loaded by any number of processes, and ``lightning-hift consolidate`` makes one file of them, as
    ``strategy="hift"`` writes. Such a file can be loaded, too.

    Args:
        offload: See ``HiFTStrategy``, as for all up to ``activation_budget``.
        offload_directory: On each host.
        prefetch: .
        pin_memory: .
        master_weights: .
        max_group_numel: Counts the elements of the part that each process has.
        activation_budget: For each process.
        reshard_after_forward: Free the weights of a block after its forward pass and gather them again for its backward
            pass. Without it each device holds all weights from one end of a step to the other. A number: keep them
            divided among so many processes, as of one node; see ``fully_shard``.
        timeout: Processes that wait longer for another one give up.
        process_group_backend: As of ``torch.distributed.init_process_group``; default: gloo for the host, and what the
            devices speak.

    Raises:
        ValueError: As ``HiFTStrategy``; in ``fit``: an optimizer is not element-wise, or the precision is float16.
        RuntimeError: In ``fit``: processes run different code or configurations. In evaluation: they have different
            numbers of batches.
    """

    strategy_name = "hift_fsdp"

    def __init__(
        self,
        offload: Offload = HiFTOptions.offload,
        offload_directory: str | None = None,
        prefetch: bool = HiFTOptions.prefetch,
        pin_memory: bool = HiFTOptions.pin_memory,
        master_weights: MasterWeights = HiFTOptions.master_weights,
        max_group_numel: int | None = HiFTOptions.max_group_numel,
        activation_budget: str | int | None = None,
        reshard_after_forward: bool | int = True,
        timeout: timedelta = timedelta(minutes=10),
        process_group_backend: str | None = None,
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
            timeout=timeout,
            process_group_backend=process_group_backend,
        )
        self.reshard_after_forward = reshard_after_forward
        self._use: GradientUse | None = None
        self._prefetch: BackwardPrefetch | None = None

    @property
    @override
    def engine_options(self) -> dict[str, Any]:
        return {**super().engine_options, "partition": ShardedState(self.root_device)}

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @override
    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        device = self.root_device.type
        # Checkpoints are put together from what is on the hosts.
        return backend if self._process_group_backend or device == "cpu" else f"cpu:gloo,{device}:{backend}"

    @override
    def share_weights(self) -> None:
        if self.precision_plugin.precision in ("16-true", "16-mixed"):
            raise ValueError(
                f"Got precision={self.precision_plugin.precision!r} with strategy='hift_fsdp': processes would disagree"
                " about which gradients overflow. Use 'bf16-true' or 'bf16-mixed', which need no scaling."
            )
        module = self.lightning_module
        assert module is not None
        if not is_sharded_module(module):
            callback = self._callback(module.trainer)
            self._prefetch = shard(
                module,
                self.device_mesh["data_parallel"],
                self.take_from_first,
                callback.options.units,
                self.reshard_after_forward,
            )
        reshard(module)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING and trainer.ckpt_path is not None:
            callback = self._callback(trainer)
            callback.load_state_dict(load_callback_states(trainer.ckpt_path).get(callback.state_key, {}))
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            assert self.lightning_module is not None
            look_at_dtypes(self.lightning_module)

    @override
    def on_attach(self, callback: HiFTCallback) -> None:
        super().on_attach(callback)
        assert self.lightning_module is not None
        self._close()
        self._use = GradientUse(self.lightning_module)

    @override
    def backward_pass(self) -> AbstractContextManager[None]:
        assert self._use is not None
        assert self._hift is not None
        named = [item for engine in self._hift.engines for item in engine.parameters.items()]
        return self._use.backward_pass({name: p for name, p in named if p.requires_grad})

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._reshard()
        if self._prefetch is not None:
            self._prefetch.follow()

    @override
    def on_validation_start(self) -> None:
        trainer = self._trainer
        check_batch_counts(
            trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches, "validate"
        )

    @override
    def on_test_start(self) -> None:
        check_batch_counts(self._trainer.num_test_batches, "test")

    @override
    def on_predict_start(self) -> None:
        check_batch_counts(self._trainer.num_predict_batches, "predict")

    # Evaluation leaves gathered what training would have freed; whoever looks for parameters then would find copies.
    @override
    def on_validation_end(self) -> None:
        self._reshard()

    @override
    def on_test_end(self) -> None:
        self._reshard()

    @override
    def on_predict_end(self) -> None:
        self._reshard()

    @override
    def teardown(self) -> None:
        self._close()
        super().teardown()

    def _close(self) -> None:
        if self._use is not None:
            self._use.close()
            self._use = None

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _reshard(self) -> None:
        assert self.lightning_module is not None
        reshard(self.lightning_module)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    # --- checkpoints --------------------------------------------------------------------------------------------------

    # As in Lightning's other strategies: ModelParallelStrategy would bring all state to the device.
    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).optimizer_state(optimizer)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super(ModelParallelStrategy, self).load_optimizer_state_dict(checkpoint)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError(f"Got storage_options={storage_options!r}; strategy='hift_fsdp' writes to folders only.")
        save_sharded(checkpoint, self.broadcast(filepath))

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        path = self.broadcast(checkpoint_path)
        assert self.lightning_module is not None
        if is_sharded_checkpoint(path):
            return load_sharded(path, self.lightning_module, self.optimizers, weights_only)
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        saved = dict(checkpoint["state_dict"])
        for name in saved.keys() & own.keys():
            if saved[name].shape == own[name].shape:  # else torch says what is wrong
                saved[name] = as_sharded(local_part(saved[name], own[name]).to(self.root_device), own[name])
        self.lightning_module.load_state_dict(saved, strict=strict)
