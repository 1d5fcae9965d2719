"""A tag for each word: named entities, chunks, parts of speech."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.classification import Accuracy
from typing_extensions import override

from lightning_hift.activations.chunked_loss import IGNORED_LABEL
from lightning_hift.tasks.adapters import of_own_tokens
from lightning_hift.tasks.entities import EntityScores, mark_entities
from lightning_hift.tasks.transformer import TransformerModule, label_names, warn_of_other_order

_NO_INPUTS = ("labels", "word_numbers", "num_words")


class TokenClassification(TransformerModule):
    """Trains ``AutoModelForTokenClassification`` to tag words.

    A batch is a mapping of ``input_ids`` and ``attention_mask``, shape (batch, length), whatever else the network
    takes, and ``labels`` of the same shape: indices of tags, -100 where a token has none. With ``word_numbers``, shape
    (batch, length), which word begins at a token, counted from 1, and 0 where none does, only those tokens are
    measured; ``num_words``, shape (batch,), says how many words a sentence has.

    Logs ``val_loss`` and ``val_accuracy``, over words; where tags mark entities (BIO, IOB1, BIOES, BILOU), also
    ``val_precision``, ``val_recall`` and ``val_f1`` of entities as conlleval counts them. With ``test_`` in a test.
    Words that were cut off are in none of these.

    Args:
        labels: Names of the tags, or their number; default: those of the data module, or of ``model``.
        kwargs: See ``TransformerModule``.

    Raises:
        ValueError: See ``TransformerModule``; or there are fewer than two ``labels``.
    """

    auto_class = "AutoModelForTokenClassification"

    def __init__(self, *, labels: list[str] | int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if labels is not None and (labels if isinstance(labels, int) else len(labels)) < 2:
            raise ValueError(f"Got labels={labels!r}; there must be at least two tags to choose from.")
        self.labels = labels

    @override
    def config_fields(self) -> dict[str, Any]:
        names = label_names(self, self.labels)
        if names is None:
            return {}
        warn_of_other_order(self.source, self.config, names)
        return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    @override
    def make_metrics(self) -> dict[str, Metric]:
        names = self._names
        metrics: dict[str, Metric] = {
            "accuracy": Accuracy("multiclass", num_classes=len(names), ignore_index=IGNORED_LABEL)
        }
        return {**metrics, "entities": EntityScores(names)} if mark_entities(names) else metrics

    @override
    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean loss per token that has a label, a scalar."""
        return _loss(self._logits(batch), batch["labels"])

    @override
    def evaluate(self, batch: Mapping[str, Any], stage: Literal["val", "test"]) -> None:
        labels = batch["labels"]
        num_labels = int((labels != IGNORED_LABEL).sum())
        if num_labels == 0:
            return
        logits = self._logits(batch)
        self.log(f"{stage}_loss", _loss(logits, labels), prog_bar=True, batch_size=num_labels, sync_dist=True)
        if "word_numbers" in batch:
            labels = labels.masked_fill(batch["word_numbers"] == 0, IGNORED_LABEL)
        self.metrics[stage].update(logits.argmax(-1), labels)  # type: ignore[operator]

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """One record per sentence: ``tags``, one per word; ``None`` for a word without a token, or cut off.

        Without ``word_numbers`` in the batch, one per token.
        """
        logits = self._logits(batch)
        names = self._names
        if "word_numbers" not in batch:
            present = batch.get("attention_mask", batch["input_ids"].new_ones(logits.shape[:2])).bool()
            return [
                {"tags": [names[i] for i in row[mask].tolist()]}
                for row, mask in zip(logits.argmax(-1), present, strict=True)
            ]
        records = []
        for row, numbers, num_words in zip(
            logits.argmax(-1).tolist(), batch["word_numbers"].tolist(), batch["num_words"].tolist(), strict=True
        ):
            tags: list[str | None] = [None] * num_words
            for i, number in zip(row, numbers, strict=True):
                if number:
                    tags[number - 1] = names[i]
            records.append({"tags": tags})
        return records

    def _logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Of the tags, shape (batch, length, tags)."""
        output = self({name: value for name, value in batch.items() if name not in _NO_INPUTS})
        return of_own_tokens(output.logits, batch["input_ids"]).float()

    @property
    def _names(self) -> list[str]:
        assert self.network is not None, "configure_model builds the network; the Trainer calls it"
        names: dict[int, str] = self.network.config.id2label  # type: ignore[union-attr, assignment]
        return [names[i] for i in range(len(names))]


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
