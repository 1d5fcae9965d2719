"""A causal language model of the transformers library, from its configuration alone."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.module import HiFTModule
from lightning_hift.tasks.chunked_loss import IGNORED_LABEL, chunked_loss, refuse_other_losses


class CausalLM(HiFTModule):
    """Trains a causal language model from random weights; needs no network and no files.

    A batch is a mapping of ``input_ids``, an integer tensor of shape (batch, length), and whatever else the model's
    forward takes, such as ``attention_mask``. Without ``labels``, the model learns to predict its input.

    Args:
        model_type: Architecture by its name in transformers: ``"llama"``, ``"gpt2"``, ``"qwen3"``.
        model_config: Fields of the architecture's configuration that differ from its defaults.
        optimizer: Builds the optimizer from parameters.
        lr_scheduler: Builds the scheduler from the optimizer; default: a constant learning rate.
        interval: Whether the scheduler counts optimizer steps or epochs.
        bytes_per_token: Mean bytes of text per token, 1 for a model of bytes. With it, ``val_bits_per_byte`` is logged
            beside ``val_loss`` (nats per token), which makes vocabularies comparable.
        loss_chunk_tokens: Compute head and loss over so many tokens at a time, so that only their logits exist; a few
            hundred to a few thousand for a large vocabulary. The loss stays the same but for rounding. Costs the head's
            forward pass a second time. For models whose loss is the plain cross-entropy of their head's output, which
            is tried once on a tiny batch.
        accumulate_grad_batches: See ``HiFTModule``.
        gradient_clip_val: See ``HiFTModule``.
        gradient_clip_algorithm: See ``HiFTModule``.
        lr_monitor: See ``HiFTModule``.

    Raises:
        ValueError: An argument is out of range. In ``configure_model``: transformers has no causal language model of
            this type, or its configuration has no such field. At the first loss: ``loss_chunk_tokens`` does not go with
            this model.
    """

    network: nn.Module | None

    def __init__(
        self,
        model_type: str,
        model_config: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        interval: Literal["step", "epoch"] = "step",
        bytes_per_token: float | None = None,
        loss_chunk_tokens: int | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        lr_monitor: str = "val_loss",
    ) -> None:
        super().__init__(accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm, lr_monitor)
        if bytes_per_token is not None and bytes_per_token <= 0:
            raise ValueError(f"Got bytes_per_token={bytes_per_token}; it must be above 0.")
        if loss_chunk_tokens is not None and loss_chunk_tokens < 1:
            raise ValueError(f"Got loss_chunk_tokens={loss_chunk_tokens}; it must be at least 1.")
        self.model_type = model_type
        self.model_config = model_config or {}
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.interval = interval
        self.bytes_per_token = bytes_per_token
        self.loss_chunk_tokens = loss_chunk_tokens
        self._tried_modes: set[bool] = set()  # training and evaluation, in which the loss may differ
        self.network = None

    @override
    def configure_model(self) -> None:
        if self.network is None:
            self.network = build_network(self.model_type, self.model_config)

    @override
    def forward(self, batch: Mapping[str, Any]) -> Any:
        """The network's output: ``logits`` of shape (batch, length, vocabulary), and ``loss`` if there are labels."""
        assert self.network is not None, "configure_model builds the network; the Trainer calls it"
        return self.network(**batch)

    @override
    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits, shape (batch, length, vocabulary)."""
        logits: Tensor = self(batch).logits
        return logits

    @override
    def configure_optimizers(self) -> Any:
        optimizer: Optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": self.interval},
        }

    def _loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean loss in nats per predicted token, and the number of predicted tokens; both scalars."""
        labels = batch.get("labels", batch["input_ids"])
        if self.loss_chunk_tokens is None:
            loss: Tensor = self({**batch, "labels": labels}).loss
        else:
            loss = self._loss_in_chunks(batch, labels, self.loss_chunk_tokens)
        return loss, (labels[:, 1:] != IGNORED_LABEL).sum()

    def _loss_in_chunks(self, batch: Mapping[str, Any], labels: Tensor, chunk_tokens: int) -> Tensor:
        assert self.network is not None, "configure_model builds the network; the Trainer calls it"
        if self.network.training not in self._tried_modes:
            refuse_other_losses(self.network)
            self._tried_modes.add(self.network.training)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return chunked_loss(self.network, inputs, labels, chunk_tokens)

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        loss, num_tokens = self._loss(batch)
        # Weighted by tokens: the last batch may be smaller, and labels may leave tokens out.
        weight = int(num_tokens)
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=weight)
        if self.bytes_per_token is not None:
            bits = loss / math.log(2) / self.bytes_per_token
            self.log(f"{stage}_bits_per_byte", bits, prog_bar=True, batch_size=weight)


def build_network(model_type: str, model_config: Mapping[str, Any]) -> nn.Module:
    """A causal language model with random weights.

    Args:
        model_type: As in transformers' ``AutoConfig.for_model``.
        model_config: Fields of the configuration that differ from the defaults.

    Raises:
        ValueError: transformers has no causal language model of this type, or its configuration has no such field.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"Got model_type={model_type!r}, which is no causal language model of the installed transformers."
            f" {_nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} All types:"
            " transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES."
        )
    defaults = AutoConfig.for_model(model_type)
    unknown = [key for key in model_config if not (hasattr(defaults, key) or hasattr(defaults, f"_{key}"))]
    if unknown:  # transformers would keep it as an attribute that nothing reads
        raise ValueError(
            f"Got {unknown[0]!r} in model_config, which is no field of {type(defaults).__name__}."
            f" {_nearest(unknown[0], defaults.to_dict())}"
        )
    # A cache of keys and values serves generation; in training it only costs memory.
    try:
        config = AutoConfig.for_model(model_type, **{"use_cache": False, **model_config})
    except Exception as error:  # transformers has classes of its own for what does not go together
        raise ValueError(
            f"Got model_config={dict(model_config)}, which {type(defaults).__name__} of transformers refuses:"
            f" {error.__cause__ or error} Change those values."
        ) from error
    network: nn.Module = AutoModelForCausalLM.from_config(config)
    return network


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(name, list(known), cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, matches))}?" if matches else "Check its spelling."
