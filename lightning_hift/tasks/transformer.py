"""What all tasks have in common: a network of transformers, its optimizer, its schedule."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_hift.engine.lr_forecast import SPANS_RUN
from lightning_hift.plugin.late_value import LateValue
from lightning_hift.plugin.module import HiFTModule
from lightning_hift.plugin.training_speed import TrainingSpeed
from lightning_hift.tasks.adapters import RankAllocation, add_adapter
from lightning_hift.tasks.export import EXPORT_KEY, ExportRecord, check_labels, read_tokenizer_files, save_pretrained
from lightning_hift.tasks.metric_precision import FullPrecisionMetrics, full_precision_default
from lightning_hift.tasks.network import (
    DType,
    NetworkSource,
    build_network,
    peft_task_type,
    position_embeddings,
    read_config,
    tell_padding,
)
from lightning_hift.tasks.weight_decay import decay_groups

_RANKS_KEY = "adalora_ranks"

ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"]


class TransformerModule(HiFTModule):
    """Base class of the tasks: builds a network of transformers, with optimizer and schedule.

    A subclass names ``auto_class`` and writes ``loss``; ``evaluate`` and ``predict_step`` where it needs more. Networks
    are built in ``configure_model``, so a module can be made, printed and planned for without reading weights.

    Args:
        model: Name on the Hugging Face hub, or a local folder.
        model_type: Instead of ``model``: an architecture by its name in transformers, such as ``"llama"``, which starts
            from random weights and needs no files.
        model_config: Fields of the configuration that differ from those of ``model``, or from the defaults.
        random_weights: Take only the configuration of ``model``.
        dtype: Of the weights as loaded. Leave it for ``precision="bf16-true"``, whose masters are taken from them.
        attn_implementation: ``"sdpa"``, ``"flash_attention_2"``, ``"eager"``...; default: what transformers chooses.
        gradient_checkpointing: Recompute all blocks in the backward pass. ``activation_budget`` of the strategy
            recomputes only as many as must be.
        revision: Branch, tag or commit on the hub.
        adapter: ``peft_type`` and arguments of an adapter of the peft library; only it (and a new head) is trained.
        optimizer: Builds the optimizer from parameter groups; default: AdamW. Its weight decay spares norms and biases.
        lr_scheduler: Builds the scheduler from the optimizer; or the name of a schedule over the whole run, as in
            transformers' ``get_scheduler``. Default: a constant learning rate.
        warmup: For a schedule by name: the share of the steps in which the learning rate rises from 0.
        interval: Whether a scheduler that is built counts optimizer steps or epochs.
        accumulate_grad_batches: See ``HiFTModule``.
        gradient_clip_val: See ``HiFTModule``.
        gradient_clip_algorithm: See ``HiFTModule``.
        lr_monitor: See ``HiFTModule``.

    Raises:
        ValueError: An argument is out of range. In ``configure_model``: transformers has no such network or head, the
            configuration has no such field, or the weights do not fit it.
        OSError: In ``configure_model``: ``model`` is neither a folder nor to be had from cache or hub.
    """

    auto_class: ClassVar[str]
    """Which head the task needs, by transformers' auto class."""

    network: nn.Module | None

    def __init__(
        self,
        model: str | None = None,
        model_type: str | None = None,
        model_config: dict[str, Any] | None = None,
        random_weights: bool = False,
        dtype: DType = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        adapter: dict[str, Any] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: ScheduleName | LRSchedulerCallable | None = None,
        warmup: float = 0.06,
        interval: Literal["step", "epoch"] = "step",
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        lr_monitor: str = "val_loss",
    ) -> None:
        super().__init__(accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm, lr_monitor)
        if not 0 <= warmup < 1:
            raise ValueError(f"Got warmup={warmup}; it is a share of the steps, at least 0 and below 1.")
        if isinstance(lr_scheduler, str) and lr_scheduler not in get_args(ScheduleName):
            raise ValueError(
                f"Got lr_scheduler={lr_scheduler!r}; by name there are {', '.join(get_args(ScheduleName))}. Others are"
                " given by class path."
            )
        self.source = NetworkSource(
            model,
            model_type,
            model_config or {},
            random_weights,
            dtype,
            attn_implementation,
            gradient_checkpointing,
            revision,
        )
        self.adapter = adapter
        # No default in the signature: jsonargparse would hand its weight decay and eps on to whichever class is chosen.
        self.optimizer: OptimizerCallable = torch.optim.AdamW if optimizer is None else optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup = warmup
        self._shown_loss = LateValue()
        self.interval = interval
        self.network = None
        self.metrics = nn.ModuleDict()
        self._ranks: RankAllocation | None = None

    @property
    def head(self) -> str:
        """The auto class that is used; a task that has several heads to choose from overrides this."""
        return self.auto_class

    @cached_property
    def config(self) -> Any:
        """The network's configuration, read without building it; a data module asks it for limits."""
        return read_config(self.source, self.head)

    @cached_property
    def max_positions(self) -> int | None:
        """The most tokens a sequence may have, or ``None`` if the architecture has no limit."""
        limit = getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "n_positions", None)
        with torch.device("meta"):
            network = build_network(self.source, self.head)
        for part in position_embeddings(network):
            if limit == part.num_embeddings and part.padding_idx is not None:
                return int(limit) - part.padding_idx - 1
        return None if limit is None or limit < 1 else int(limit)

    def config_fields(self) -> dict[str, Any]:
        """Fields of the configuration that follow from the task, such as label names."""
        return {}

    def make_metrics(self) -> Mapping[str, Any]:
        """Metrics by name, each a ``torchmetrics.Metric``; made anew for validation and test.

        Their states are float32 in every precision, and what they are updated with in 16 bits is converted.
        """
        return {}

    @abstractmethod
    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of one micro-batch, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(batch).")

    def evaluate(self, batch: Mapping[str, Any], stage: Literal["val", "test"]) -> None:
        """Log what is measured on one batch; ``self.metrics[stage]`` holds the metrics."""
        self.log(f"{stage}_loss", self.loss(batch), prog_bar=True, batch_size=len(batch["input_ids"]), sync_dist=True)

    @override
    def configure_model(self) -> None:
        if self.network is not None:
            return
        network = build_network(self.source, self.head, **self._fields_of_tokens(), **self.config_fields())
        if self._tokenizer is not None:
            tell_padding(network, self._tokenizer.pad_token_id)
        if self.adapter is not None:
            network = self._adapted(network, self.adapter)
        self.network = network
        for stage in ("val", "test"):
            with full_precision_default():
                metrics = self.make_metrics()
            if metrics:
                self.metrics[stage] = FullPrecisionMetrics(metrics, prefix=f"{stage}_")

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        given = self._trainer.callbacks if self._trainer is not None else []  # type: ignore[attr-defined]
        has_one = any(isinstance(callback, TrainingSpeed) for callback in given)
        return [*super().configure_callbacks(), *([] if has_one else [TrainingSpeed()])]

    @override
    def forward(self, batch: Mapping[str, Any]) -> Any:
        """The network's output for a batch of its arguments."""
        assert self.network is not None, "configure_model builds the network; the Trainer calls it"
        return self.network(**batch)

    @override
    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        shown = self._shown_loss.update(loss, self.trainer)
        self.log("train_loss", shown, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self._ranks is not None:
            self._ranks.note_gradients()
        super().on_before_optimizer_step(optimizer)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        steps = self.global_step
        output = super().training_step(batch, batch_idx)
        if self._ranks is not None and self.global_step > steps:
            self._ranks.allocate(self.global_step)  # here, before any callback saves a checkpoint
        return output

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    @override
    def on_validation_epoch_start(self) -> None:
        self._reset_metrics("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._reset_metrics("test")

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    @override
    def configure_optimizers(self) -> Any:
        optimizer: Optimizer = self.optimizer(decay_groups(self))
        if self.lr_scheduler is None or (isinstance(self.lr_scheduler, str) and self._trainer is None):
            return optimizer  # without a Trainer, as for a plan, a run has no length
        if not isinstance(self.lr_scheduler, str):
            scheduler: Any = self.lr_scheduler(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}
        from transformers import get_scheduler

        steps = self.num_training_steps
        # It begins at 0, so the last step cannot be part of it.
        warmup = max(0, min(math.ceil(self.warmup * steps), steps - 1))
        scheduler = get_scheduler(self.lr_scheduler, optimizer, warmup, steps)
        setattr(scheduler, SPANS_RUN, True)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what ``lightning-hift export`` needs beside the weights."""
        if self.network is not None:
            checkpoint[EXPORT_KEY] = asdict(ExportRecord.of(self, self.tokenizer_files))
        if self._ranks is not None:
            checkpoint[_RANKS_KEY] = self._ranks.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.network is not None and EXPORT_KEY in checkpoint:
            check_labels(checkpoint[EXPORT_KEY], self.network)
        if self._ranks is not None and _RANKS_KEY in checkpoint:
            self._ranks.load_state_dict(checkpoint[_RANKS_KEY])

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: Any = None,
        dtype: DType | None = None,
        merge: bool = False,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
    ) -> Path:
        """Write a folder that ``from_pretrained`` of transformers opens, or of peft where there is an adapter.

        It holds weights (safetensors), configuration, tokenizer, and a README.md with the facts of the run. The weights
        are written from where they are; another ``dtype`` takes the memory of a copy.

        Args:
            folder: New or empty.
            tokenizer: Default: that of the data module.
            dtype: Of the weights that are written; default: as they are.
            merge: Work an adapter into the weights and write the whole model.
            overwrite: Replace what an earlier export wrote to ``folder``.
            max_shard_size: Most bytes per file of weights.

        Returns:
            The folder.

        Raises:
            RuntimeError: The network is not built.
            FileExistsError: ``folder`` is not empty, and ``overwrite`` is not set.
            ValueError: There is nothing to merge, or it cannot be merged.
        """
        return save_pretrained(self, folder, tokenizer, dtype, merge, overwrite, max_shard_size)

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the data module's tokenizer; empty where there is none."""
        return read_tokenizer_files(self._tokenizer)

    @property
    def num_training_steps(self) -> int:
        """Optimizer steps of the whole run.

        ``Trainer.estimated_stepping_batches`` does not know of ``accumulate_grad_batches`` of this module, and to ask
        it before a checkpoint was read makes the Trainer forget where in the epoch the data stood.
        """
        trainer = self.trainer
        datamodule = getattr(trainer, "datamodule", None)
        loader: Any = None if datamodule is None else datamodule.train_dataloader()
        if not hasattr(loader, "__len__"):
            batches = trainer.estimated_stepping_batches
            return math.ceil(batches / self.accumulate_grad_batches)
        limit = trainer.limit_train_batches
        batches = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
        steps = math.ceil(batches / self.accumulate_grad_batches) * epochs
        if trainer.max_steps >= 0:
            steps = min(steps, trainer.max_steps)
        if steps == math.inf:
            raise ValueError(
                f"Got lr_scheduler={self.lr_scheduler!r} in a run without an end. Set max_epochs or max_steps, or use a"
                " constant learning rate."
            )
        return int(steps)

    def of_data(self, name: str, default: Any = None) -> Any:
        """An attribute of the data module; ``default`` if it has none of that name, or there is no data module."""
        return getattr(getattr(self._trainer, "datamodule", None), name, default)

    @property
    def _tokenizer(self) -> Any:
        """That of the data module, or ``None``."""
        return self.of_data("tokenizer")

    def _adapted(self, network: nn.Module, adapter: dict[str, Any]) -> nn.Module:
        spreads_ranks = adapter.get("peft_type") == "ADALORA"
        if spreads_ranks and "total_step" not in adapter and self._trainer is not None:
            adapter = {**adapter, "total_step": self.num_training_steps}
        network = add_adapter(network, adapter, peft_task_type(self.head))
        if spreads_ranks:
            self._ranks = RankAllocation(network)
        return network

    def _fields_of_tokens(self) -> dict[str, Any]:
        """The vocabulary of a network to be made, if the data module's tokenizer needs more."""
        if self._tokenizer is None:
            return {}
        needed, there = len(self._tokenizer), getattr(self.config, "vocab_size", None)
        if there is None or needed <= there:
            return {}
        is_free = self.source.model is None or self.source.random_weights
        if not is_free or "vocab_size" in self.source.model_config:
            raise ValueError(
                f"Got a tokenizer of {needed} tokens for a network of {there}. Use the network's own tokenizer, or"
                " random_weights; leave vocab_size out of model_config."
            )
        return {"vocab_size": needed}

    def _reset_metrics(self, stage: str) -> None:
        # At the start, not at the end: the sums of a test are inference tensors, which a fit could not go on with.
        if stage in self.metrics:
            self.metrics[stage].reset()  # type: ignore[operator]

    def _log_metrics(self, stage: str) -> None:
        if stage in self.metrics:
            collection = self.metrics[stage]
            assert isinstance(collection, MetricCollection)
            # All processes have to agree on whether there is something to gather.
            is_updated = any(metric.update_called for metric in collection.values())
            if not self.trainer.strategy.reduce_boolean_decision(is_updated, all=False):
                return
            self.log_dict({name: value.float() for name, value in collection.compute().items()}, prog_bar=True)


def label_names(module: TransformerModule, given: Sequence[str] | int | None) -> list[str] | None:
    """Names of the labels: those given, or those of the data module, or ``None`` where nobody knows.

    Args:
        module: A module, perhaps attached to a Trainer.
        given: Names, or their number.

    Raises:
        ValueError: Others are given than those of the data module, whose order is that of the targets.
    """
    found = module.of_data("label_names")
    if given is None:
        return None if found is None else list(found)
    names = [f"LABEL_{i}" for i in range(given)] if isinstance(given, int) else list(given)
    if found is not None and (len(names) != len(found) if isinstance(given, int) else names != list(found)):
        raise ValueError(
            f"Got labels={given!r} in the module, but the data module has {', '.join(found)}. Leave labels out, or give"
            " the same in the same order."
        )
    return names


def warn_of_other_order(source: NetworkSource, config: Any, names: Sequence[str]) -> None:
    """Warn if a trained head has the same labels in another order, so that each starts with another one's weights."""
    own = list(config.id2label.values())
    if source.model is not None and not source.random_weights and own != list(names) and sorted(own) == sorted(names):
        rank_zero_warn(
            f"The head of model={source.model!r} has the labels {', '.join(own)}, but here they are in another order:"
            f" {', '.join(names)}. What it has learned is lost; give the head's order, if the data allow it."
        )
