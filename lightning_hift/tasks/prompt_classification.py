"""Classification by a language model that fills a blank: the few-shot setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from typing_extensions import override

from lightning_hift.tasks.adapters import of_own_tokens
from lightning_hift.tasks.sequence_classification import class_metrics
from lightning_hift.tasks.transformer import TransformerModule


class PromptClassification(TransformerModule):
    """Trains a language model to prefer, in a blank, the word that stands for the right label (LM-BFF, 2021).

    No layer is new, so few examples suffice. A batch is a mapping of what the network takes, ``blank_position``, shape
    (batch,), and ``labels``, shape (batch,); see ``PromptDataModule``.

    Logs ``val_loss``, ``val_accuracy``, ``val_f1`` and ``val_matthews``, with ``test_`` in a test.

    Args:
        head: ``"masked"`` trains ``AutoModelForMaskedLM``, ``"causal"`` ``AutoModelForCausalLM``.
        word_ids: Token of each label's word; default: those of the data module's verbalizer.
        kwargs: See ``TransformerModule``.

    Raises:
        ValueError: See ``TransformerModule``; or nobody says which words stand for the labels.
    """

    def __init__(
        self, *, head: Literal["masked", "causal"] = "masked", word_ids: list[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if head not in ("masked", "causal"):
            raise ValueError(f"Got head={head!r}; it must be 'masked' or 'causal'.")
        self.is_causal = head == "causal"
        self.word_ids = word_ids

    @property
    @override
    def head(self) -> str:
        return "AutoModelForCausalLM" if self.is_causal else "AutoModelForMaskedLM"

    @override
    def make_metrics(self) -> dict[str, Metric]:
        return class_metrics(len(self._words()))

    def scores(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits of the labels' words in the blank, shape (batch, labels)."""
        inputs = {name: value for name, value in batch.items() if name not in ("blank_position", "labels")}
        logits = of_own_tokens(self(inputs).logits, batch["input_ids"])
        rows = torch.arange(len(logits), device=logits.device)
        chosen: Tensor = logits[rows, batch["blank_position"]][:, self._words()]
        return chosen.float()

    @override
    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        return cross_entropy(self.scores(batch), batch["labels"])

    @override
    def evaluate(self, batch: Mapping[str, Any], stage: Literal["val", "test"]) -> None:
        scores = self.scores(batch)
        loss = cross_entropy(scores, batch["labels"])
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=len(scores), sync_dist=True)
        self.metrics[stage].update(scores.argmax(-1), batch["labels"])  # type: ignore[operator]

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """One record per text: ``label`` and ``probability`` among the labels."""
        probabilities, chosen = self.scores(batch).softmax(-1).max(-1)
        names = self.of_data("label_names")
        return [
            {"label": names[i] if names is not None else i, "probability": p}
            for i, p in zip(chosen.tolist(), probabilities.tolist(), strict=True)
        ]

    def _words(self) -> list[int]:
        if self.word_ids is None:
            self.word_ids = self.of_data("word_ids")
        if self.word_ids is None:
            raise ValueError(
                "Got no word_ids, and no data module that knows them. Give the token of each label's word, or use a"
                " PromptDataModule."
            )
        return self.word_ids
