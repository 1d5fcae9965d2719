"""Metrics of generated texts against references; sums, so that processes with unequal shares can be gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text import rouge_score
from typing_extensions import override

_KEYS = ("rouge1", "rouge2", "rougeL")


class Rouge(Metric):
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, each text against that of its references which it is nearest to.

    The scores of ``torchmetrics.text.ROUGEScore``, which keeps one tensor per text: gathering those waits forever where
    processes have unequal numbers of texts.
    """

    full_state_update = False
    higher_is_better = True
    scores: Tensor
    num_scored: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", torch.zeros(len(_KEYS)), dist_reduce_fx="sum")
        self.add_state("num_scored", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add texts, each with its references."""
        found = rouge_score(list(predictions), [list(texts) for texts in references], rouge_keys=_KEYS)
        means = [float(found[f"{key}_fmeasure"]) for key in _KEYS]
        self.scores += torch.tensor(means, device=self.scores.device) * len(predictions)
        self.num_scored += len(predictions)

    @override
    def compute(self) -> dict[str, Tensor]:
        """``rouge1``, ``rouge2`` and ``rougeL``, from 0 to 1."""
        return dict(zip(_KEYS, self.scores / self.num_scored, strict=True))


class ExactMatch(Metric):
    """Share of texts that are, but for space around them, the same as one of their references."""

    full_state_update = False
    higher_is_better = True
    matches: Tensor
    num_compared: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("matches", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("num_compared", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add texts, each with its references."""
        for prediction, texts in zip(predictions, references, strict=True):
            self.matches += prediction.strip() in {text.strip() for text in texts}
        self.num_compared += len(predictions)

    @override
    def compute(self) -> Tensor:
        """From 0 to 1."""
        return self.matches / self.num_compared
