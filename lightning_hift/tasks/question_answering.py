"""Answers to questions, as spans of a text in which they are found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from typing_extensions import override

from lightning_hift.tasks.adapters import of_own_tokens
from lightning_hift.tasks.answer_spans import AnswerScores, Spans, best_spans
from lightning_hift.tasks.transformer import TransformerModule

_TARGETS = ("start_positions", "end_positions")
_NO_INPUTS = (*_TARGETS, "question", "id", "text", "answers", "char_starts", "char_ends", "null_positions")


class QuestionAnswering(TransformerModule):
    """Trains ``AutoModelForQuestionAnswering`` to find the answer to a question in a text.

    A batch is a mapping of ``input_ids`` and ``attention_mask``, shape (batch, length), whatever else the network
    takes, and the first and last token of the answer: ``start_positions`` and ``end_positions``, shape (batch,). For
    more than a loss, each row also has

    - ``question``, shape (batch,): the number of its question, as a long text is spread over several rows;
    - ``null_positions``, shape (batch,): the token that stands for no answer;
    - ``text``, a list of strings, and ``char_starts`` and ``char_ends``, shape (batch, length): the piece of text in
      this row, and which characters of it each token stands for, none (0 to 0) for tokens of anything else;
    - ``answers``, a list of lists of strings: the right ones, ``[""]`` if there is none; ``id``, a list of strings.

    Logs ``val_loss``; with ``answers`` also ``val_exact_match`` and ``val_f1``, shares between 0 and 1, as in the
    evaluation of SQuAD. With ``test_`` in a test.

    Args:
        max_answer_length: The longest answer, in tokens.
        null_threshold: Give no answer if that scores more than the best span, by more than this; 0 is a good start for
            SQuAD 2. ``None`` always answers.
        n_best: So many answers per question in predictions.
        kwargs: See ``TransformerModule``.

    Raises:
        ValueError: See ``TransformerModule``; or ``max_answer_length`` or ``n_best`` is below 1.
    """

    auto_class = "AutoModelForQuestionAnswering"

    def __init__(
        self, *, max_answer_length: int = 30, null_threshold: float | None = None, n_best: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for name, value in {"max_answer_length": max_answer_length, "n_best": n_best}.items():
            if value < 1:
                raise ValueError(f"Got {name}={value}; it must be at least 1.")
        self.max_answer_length = max_answer_length
        self.null_threshold = null_threshold
        self.n_best = n_best

    @override
    def make_metrics(self) -> dict[str, Metric]:
        return {"answers": AnswerScores(self.null_threshold)}

    @override
    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean loss of start and end per row, a scalar."""
        return _loss(batch, *self._logits(batch))

    @override
    def evaluate(self, batch: Mapping[str, Any], stage: Literal["val", "test"]) -> None:
        logits = self._logits(batch)
        self.log(
            f"{stage}_loss", _loss(batch, *logits), prog_bar=True, batch_size=len(batch["input_ids"]), sync_dist=True
        )
        if "answers" in batch:
            spans, null_scores = self._spans(batch, *logits, n=1)
            texts = [texts[0] for texts in _texts(batch, spans)]
            self.metrics[stage]["answers"].update(  # type: ignore[index]
                batch["question"], spans.scores[:, 0], null_scores, texts, batch["answers"]
            )

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """One record per question: ``id``, ``answer`` and ``score``, by how much it scores more than no answer.

        With ``n_best`` above 1, ``others`` lists the next best in the same way. All rows of a question must be in the
        same batch, as those of ``QuestionAnsweringDataModule`` are.
        """
        spans, null_scores = self._spans(batch, *self._logits(batch), self.n_best)
        candidates: dict[int, dict[str, float]] = {}
        nulls: dict[int, float] = {}
        names: dict[int, str] = {}
        rows = (batch["question"].tolist(), batch["id"], _texts(batch, spans), spans.scores.tolist())
        for question, name, texts, scores, null in zip(*rows, null_scores.tolist(), strict=True):
            names[question] = name
            nulls[question] = min(null, nulls.get(question, null))
            found = candidates.setdefault(question, {})
            for text, score in zip(texts, scores, strict=True):
                found[text] = max(score, found.get(text, score))
        return [self._record(names[question], candidates[question], nulls[question]) for question in names]

    def _record(self, name: str, candidates: Mapping[str, float], null_score: float) -> dict[str, Any]:
        ranked = sorted(candidates.items(), key=lambda item: -item[1])[: self.n_best]
        answers = [{"answer": text, "score": score - null_score} for text, score in ranked if score > float("-inf")]
        if self.null_threshold is not None and -answers[0]["score"] > self.null_threshold:  # type: ignore[operator]
            answers = [{"answer": "", "score": 0.0}, *answers][: self.n_best]
        record = {"id": name, **answers[0]}
        return {**record, "others": answers[1:]} if self.n_best > 1 else record

    def _spans(self, batch: Mapping[str, Any], starts: Tensor, ends: Tensor, n: int) -> tuple[Spans, Tensor]:
        """The best spans of each row, and its score of having no answer."""
        allowed = batch["char_ends"] > batch["char_starts"]
        null = batch["null_positions"][:, None]
        null_scores = (starts.gather(1, null) + ends.gather(1, null)).squeeze(1)
        return best_spans(starts, ends, allowed, n, self.max_answer_length), null_scores

    def _logits(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Of start and end, shape (batch, length); minus infinity for padding, which is no place to choose from."""
        inputs = {name: value for name, value in batch.items() if name not in _NO_INPUTS}
        # A tokenizer may mark the text as of a second type, where the network knows only one.
        if getattr(self.config, "type_vocab_size", 2) < 2:
            inputs.pop("token_type_ids", None)
        output = self(inputs)
        mask = batch.get("attention_mask")
        is_padding = torch.zeros_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask == 0
        starts, ends = (
            of_own_tokens(logits, batch["input_ids"]).float().masked_fill(is_padding, float("-inf"))
            for logits in (output.start_logits, output.end_logits)
        )
        return starts, ends


def _loss(batch: Mapping[str, Any], starts: Tensor, ends: Tensor) -> Tensor:
    losses = [
        functional.cross_entropy(logits, batch[name]) for name, logits in zip(_TARGETS, (starts, ends), strict=True)
    ]
    return torch.stack(losses).mean()


def _texts(batch: Mapping[str, Any], spans: Spans) -> list[list[str]]:
    """The texts of the spans of each row."""
    starts = batch["char_starts"].gather(1, spans.first).tolist()
    ends = batch["char_ends"].gather(1, spans.last).tolist()
    return [
        [text[first:end].strip() for first, end in zip(firsts, lasts, strict=True)]
        for text, firsts, lasts in zip(batch["text"], starts, ends, strict=True)
    ]
