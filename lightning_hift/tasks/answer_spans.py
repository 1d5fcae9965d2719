"""Spans of a text that answer a question, and how well they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.functional.text import squad
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override


class Spans(NamedTuple):
    """The best spans of each row, best first, all of shape (batch, n)."""

    scores: Tensor
    """Sum of the logits of start and end; minus infinity where there are fewer than n spans."""
    first: Tensor
    last: Tensor


def best_spans(start_logits: Tensor, end_logits: Tensor, allowed: Tensor, n: int, max_tokens: int) -> Spans:
    """The best of all spans that start and end at allowed tokens, in this order.

    Args:
        start_logits: Shape (batch, length).
        end_logits: Likewise.
        allowed: Likewise, bool.
        n: How many are wanted.
        max_tokens: The longest span.
    """
    lowest = float("-inf")
    starts, ends = (logits.masked_fill(~allowed, lowest) for logits in (start_logits, end_logits))
    width = min(max_tokens, starts.shape[1])
    following = functional.pad(ends, (0, width - 1), value=lowest).unfold(1, width, 1)  # (batch, first, last - first)
    scores, flat = (starts[..., None] + following).flatten(1).topk(min(n, starts.shape[1] * width))
    first = flat // width
    return Spans(scores, first, first + flat % width)


class AnswerScores(Metric):
    """Exact match and F1 of answers to questions, as shares, as in the evaluation of SQuAD.

    A context may be spread over several rows, in any batches and processes: a question's answer is the best span of
    all its rows, its score of having no answer the lowest of theirs. A row that comes twice counts once.

    Args:
        null_threshold: A question has no answer if that scores more than the best span, by more than this; ``None``:
            every question has one.
    """

    full_state_update = False
    higher_is_better = True

    questions: list[Tensor]
    rows: list[Tensor]

    def __init__(self, null_threshold: float | None = None) -> None:
        super().__init__()
        self.null_threshold = null_threshold
        self.add_state("questions", [], dist_reduce_fx="cat")
        self.add_state("rows", [], dist_reduce_fx="cat")

    @override
    def update(
        self,
        questions: Tensor,
        span_scores: Tensor,
        null_scores: Tensor,
        texts: Sequence[str],
        answers: Sequence[Sequence[str]],
    ) -> None:
        """Add rows.

        Args:
            questions: Number of each row's question, shape (batch,).
            span_scores: Of each row's best span, likewise.
            null_scores: Of having no answer, likewise.
            texts: Of each row's best span.
            answers: The right ones; ``[""]`` for a question without an answer.
        """
        scores = [
            [*_scores(text, right), *_scores("", right)] for text, right in zip(texts, answers, strict=True)
        ]  # of the span, and of no answer
        columns = torch.tensor(scores, dtype=torch.float, device=span_scores.device)
        self.questions.append(questions)
        self.rows.append(torch.cat([span_scores[:, None], null_scores[:, None], columns], dim=1).float())

    @override
    def compute(self) -> dict[str, Tensor]:
        questions, rows = dim_zero_cat(self.questions), dim_zero_cat(self.rows)
        best_first = rows[:, 0].argsort(descending=True)
        questions, rows = questions[best_first], rows[best_first]
        order = questions.argsort(stable=True)
        _, counts = torch.unique_consecutive(questions[order], return_counts=True)
        best = rows[order][counts.cumsum(0) - counts]  # (questions, columns)
        result = best[:, 2:4]
        if self.null_threshold is not None:
            null_scores = torch.stack([part.min() for part in torch.split(rows[order, 1], counts.tolist())])
            is_null = null_scores - best[:, 0] > self.null_threshold
            result = torch.where(is_null[:, None], best[:, 4:6], result)
        exact_match, f1 = result.mean(0)
        return {"exact_match": exact_match, "f1": f1}


def _scores(text: str, answers: Sequence[str]) -> tuple[float, float]:
    found = squad(
        {"prediction_text": text, "id": ""}, {"answers": {"answer_start": [0], "text": list(answers)}, "id": ""}
    )
    return float(found["exact_match"]) / 100, float(found["f1"]) / 100
