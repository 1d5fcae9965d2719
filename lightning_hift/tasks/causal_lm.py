"""Causal language models: pre-training, and training on answers where labels leave the rest out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric
from typing_extensions import override

from lightning_hift.activations.chunked_loss import IGNORED_LABEL, chunked_loss, refuse_other_losses
from lightning_hift.tasks.adapters import of_own_tokens
from lightning_hift.tasks.metric_precision import full_precision
from lightning_hift.tasks.packing_trial import is_packed, refuse_contamination
from lightning_hift.tasks.transformer import TransformerModule


class Perplexity(MeanMetric):
    """Exponential of a mean loss per token; updated with losses and the numbers of tokens that they are means of."""

    @override
    def compute(self) -> Tensor:
        return super().compute().exp()


class CausalLM(TransformerModule):
    """Trains ``AutoModelForCausalLM`` to predict the next token.

    A batch is a mapping of ``input_ids``, an integer tensor of shape (batch, length), and whatever else the network
    takes, such as ``attention_mask``. Without ``labels``, the network learns to predict its input; labels of -100 are
    left out of the loss. ``position_ids`` that begin anew within a row, without ``attention_mask``, stand for several
    documents; whether the network keeps them apart is tried once on a tiny batch.

    Logs ``val_loss`` (nats per token) and ``val_perplexity``, with ``test_`` in a test.

    Args:
        bytes_per_token: Mean bytes of text per token, 1 for a model of bytes. With it, ``val_bits_per_byte`` is logged,
            too, which makes vocabularies comparable.
        loss_chunk_tokens: Compute head and loss over so many tokens at a time, so that only their logits exist; a few
            hundred to a few thousand for a large vocabulary. The loss stays the same but for rounding. Costs the head's
            forward pass a second time. For networks whose loss is the plain cross-entropy of their head's output, which
            is tried once on a tiny batch.
        kwargs: See ``TransformerModule``.

    Raises:
        ValueError: See ``TransformerModule``. At the first loss: ``loss_chunk_tokens`` does not go with this network,
            or rows are packed and it does not keep documents apart.
    """

    auto_class = "AutoModelForCausalLM"

    def __init__(
        self, *, bytes_per_token: float | None = None, loss_chunk_tokens: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if bytes_per_token is not None and bytes_per_token <= 0:
            raise ValueError(f"Got bytes_per_token={bytes_per_token}; it must be above 0.")
        if loss_chunk_tokens is not None and loss_chunk_tokens < 1:
            raise ValueError(f"Got loss_chunk_tokens={loss_chunk_tokens}; it must be at least 1.")
        self.bytes_per_token = bytes_per_token
        self.loss_chunk_tokens = loss_chunk_tokens
        self._tried_modes: set[bool] = set()  # training and evaluation, in which the loss may differ
        self._tried_packing: set[tuple[bool, bool]] = set()  # mode, and whether there is more than one row

    @override
    def make_metrics(self) -> dict[str, Metric]:
        return {"perplexity": Perplexity()}

    @override
    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean loss in nats per predicted token, a scalar."""
        self._try_packing(batch)
        labels = batch.get("labels", batch["input_ids"])
        if self.loss_chunk_tokens is not None:
            return self._loss_in_chunks(batch, labels, self.loss_chunk_tokens)
        loss: Tensor = self({**batch, "labels": labels}).loss
        return loss

    @override
    def evaluate(self, batch: Mapping[str, Any], stage: Literal["val", "test"]) -> None:
        loss = full_precision(self.loss(batch))
        # Weighted by tokens: the last batch may be smaller, and labels may leave tokens out.
        num_tokens = int((batch.get("labels", batch["input_ids"])[:, 1:] != IGNORED_LABEL).sum())
        if num_tokens == 0:
            return
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=num_tokens, sync_dist=True)
        self.metrics[stage]["perplexity"].update(loss.detach(), num_tokens)  # type: ignore[index]
        if self.bytes_per_token is not None:
            bits = loss / math.log(2) / self.bytes_per_token
            self.log(f"{stage}_bits_per_byte", bits, prog_bar=True, batch_size=num_tokens, sync_dist=True)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, float]]:
        """One record per row: ``loss``, mean nats per predicted token (NaN without any), and ``tokens``."""
        labels = batch.get("labels", batch["input_ids"])[:, 1:]
        logits = self({name: value for name, value in batch.items() if name != "labels"}).logits
        logits = of_own_tokens(logits, batch["input_ids"])[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none").sum(-1)
        counts = (labels != IGNORED_LABEL).sum(-1)
        return [
            {"loss": loss, "tokens": count}
            for loss, count in zip((losses / counts).tolist(), counts.tolist(), strict=True)
        ]

    def _try_packing(self, batch: Mapping[str, Any]) -> None:
        if "position_ids" not in batch or "attention_mask" in batch:
            return
        assert self.network is not None, "configure_model builds the network; the Trainer calls it"
        num_rows = min(2, len(batch["position_ids"]))
        key = (self.network.training, num_rows > 1)
        if key not in self._tried_packing and is_packed(batch["position_ids"]):
            refuse_contamination(self.network, num_rows)
            self._tried_packing.add(key)

    def _loss_in_chunks(self, batch: Mapping[str, Any], labels: Tensor, chunk_tokens: int) -> Tensor:
        assert self.network is not None, "configure_model builds the network; the Trainer calls it"
        if self.network.training not in self._tried_modes:
            refuse_other_losses(self.network)
            self._tried_modes.add(self.network.training)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return chunked_loss(self.network, inputs, labels, chunk_tokens)
