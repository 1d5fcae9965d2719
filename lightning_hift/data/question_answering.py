"""Questions about texts, answered by spans of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_hift.data.bad_rows import BadRow
from lightning_hift.data.classification import text_in
from lightning_hift.data.encoding import ROW
from lightning_hift.data.text import TRUNCATED, Split, TextDataModule
from lightning_hift.data.tokenizer import need_offsets

_MOVED, _LOST = "__moved__", "__lost__"  # columns: was an answer looked for, is it in no feature
_STRINGS = ("id", "text", "answers")

Answer = tuple[str, int]
"""Text, and the character of the context at which it starts."""


class QuestionAnsweringDataModule(TextDataModule):
    """Rows of a question, a context, and answers that are spans of it, as in SQuAD.

    The tokenizer joins question and context. A context that is too long is spread over several rows that overlap;
    those that do not hold the answer as a whole are taught to give none, by the token that stands for it: [CLS] if
    there is one, else the first. Batches are as ``QuestionAnswering`` describes them. For predictions, all rows of a
    question are in one batch, and ``eval_batch_size`` counts questions.

    An answer that is not where it is said to be is looked for in the context. If it is there exactly once, that place
    is taken, and a warning counts such answers; otherwise the row cannot be used.

    For files of SQuAD's nested form: ``FileFormat(kind="json", records="data.paragraphs.qas")``.

    Args:
        identifier: Column that names the question; ``None`` numbers them.
        question: Column of the question.
        context: Column of the text in which the answer is found.
        answers: Column of the answers; a mapping of two lists, ``text`` and ``answer_start`` (characters, from 0), or a
            list of mappings of these two; empty lists if there is no answer. The first one is taught, any is right.
            Rows to predict need none.
        answer_start: Column of where answers start, if ``answers`` holds only texts: one, or a list of them.
        stride: Tokens that neighbouring rows of the same context share, at most half of what they hold of it. An answer
            that is longer may lie in no row as a whole; a warning counts them.
        kwargs: See ``TextDataModule``.

    Raises:
        ValueError: See ``TextDataModule``; or ``stride`` is negative, or the tokenizer does not know which characters a
            token stands for.
    """

    columns_needed = ("identifier", "question", "context")
    target_columns = ("answers", "answer_start")

    def __init__(
        self,
        *,
        identifier: str | None = "id",
        question: str = "question",
        context: str = "context",
        answers: str = "answers",
        answer_start: str | None = None,
        stride: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if stride < 0:
            raise ValueError(f"Got stride={stride}; it must be at least 0.")
        self.identifier = identifier
        self.question = question
        self.context = context
        self.answers = answers
        self.answer_start = answer_start
        self.stride = stride

    @override
    def encoding_options(self) -> dict[str, Any]:
        columns = [self.identifier, self.question, self.context, self.answers, self.answer_start]
        return {"columns": columns, "stride": self.stride}

    @override
    def encode(self, row: Mapping[str, Any], split: Split) -> list[dict[str, Any]]:
        question, context = text_in(row, self.question).strip(), text_in(row, self.context)
        features = self._features(question, context)
        examples = [{**feature.inputs, TRUNCATED: False, _MOVED: False, _LOST: False} for feature in features]
        if split != "predict":
            answers = self._answers_in(row)
            positions = [(feature.null_position,) * 2 for feature in features]
            if answers:
                text, start = self._find(answers[0], context)
                examples[0][_MOVED] = start != answers[0][1]
                held = _hold(features, start, start + len(text))
                examples[0][_LOST] = not any(held)
                positions = [found or null for found, null in zip(held, positions, strict=True)]
            for example, (first, last) in zip(examples, positions, strict=True):
                example["start_positions"], example["end_positions"] = first, last
            if split != "train":
                for example in examples:
                    example["answers"] = [text for text, _ in answers] or [""]
        if split != "train":
            name = row[ROW] if self.identifier is None else row[self.identifier]
            for example, feature in zip(examples, features, strict=True):
                example.update(feature.texts(context), question=row[ROW], id=str(name))
        return examples

    @override
    def rows(self, split: Split) -> _ByQuestion | None:
        return _ByQuestion(self.examples[split]) if split == "predict" else None

    @override
    def collate(self, examples: list[Any]) -> dict[str, Any]:
        if isinstance(examples[0], list):
            examples = [example for of_question in examples for example in of_question]
        strings = {name: [example[name] for example in examples] for name in _STRINGS if name in examples[0]}
        rest = [{name: value for name, value in example.items() if name not in strings} for example in examples]
        return {**super().collate(rest), **strings}

    @override
    def count_cut(self, split: Split, examples: Any) -> None:
        if lost := sum(examples[_LOST]):
            rank_zero_warn(
                f"{lost} {split} answers are cut by the ends of all rows that hold some of them, and count as none."
                f" Raise stride={self.stride} or max_length={self.max_length}."
            )
        if moved := sum(examples[_MOVED]):
            rank_zero_warn(
                f"{moved} {split} answers do not start where they are said to; they are taken from where they stand in"
                " their contexts, which is one place each."
            )

    def _features(self, question: str, context: str) -> list[_Feature]:
        tokenizer = need_offsets(self.tokenizer)
        room = self.max_length - len(tokenizer(question, "")["input_ids"])
        if room < 1:
            raise BadRow(
                self.question,
                f"it has {len(tokenizer.tokenize(question))} tokens, which leaves nothing of"
                f" max_length={self.max_length} for the context",
            )
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self.max_length,
            stride=min(self.stride, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        del encoded["overflow_to_sample_mapping"]
        offsets = encoded.pop("offset_mapping")
        features = []
        for i, spans in enumerate(offsets):
            is_context = [number == 1 for number in encoded.sequence_ids(i)]
            ids = encoded["input_ids"][i]
            features.append(
                _Feature(
                    inputs={name: values[i] for name, values in encoded.items()},
                    spans=[(a, b) if inside else (0, 0) for (a, b), inside in zip(spans, is_context, strict=True)],
                    null_position=ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0,
                )
            )
        if not any(a < b for feature in features for a, b in feature.spans):
            raise BadRow(self.context, "the tokenizer makes nothing of it")
        return features

    def _answers_in(self, row: Mapping[str, Any]) -> list[Answer]:
        found = row.get(self.answers)
        texts: Any
        starts: Any
        if self.answer_start is not None:
            texts, starts = (
                value if isinstance(value, list) else [] if value in (None, "") else [value]
                for value in (found, row.get(self.answer_start))
            )
            starts = starts if texts else []
        elif isinstance(found, dict):
            texts, starts = found.get("text"), found.get("answer_start")
        elif isinstance(found, list) and all(isinstance(answer, dict) for answer in found):
            texts, starts = ([answer.get(key) for answer in found] for key in ("text", "answer_start"))
        else:
            raise BadRow(self.answers, f"got {found!r}; answers are a mapping of the lists text and answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise BadRow(self.answers, f"got the texts {texts!r} and the starts {starts!r}; each text needs a start")
        return [(self._check_text(text), self._check_start(start)) for text, start in zip(texts, starts, strict=True)]

    def _check_text(self, text: Any) -> str:
        if not isinstance(text, str) or not text.strip():
            raise BadRow(self.answers, f"got the answer {text!r}; if there is no answer, the list must be empty")
        return text

    def _check_start(self, start: Any) -> int:
        try:
            return int(start)
        except (TypeError, ValueError):
            raise BadRow(self.answer_start or self.answers, f"got the start {start!r}, which is no number") from None

    def _find(self, answer: Answer, context: str) -> Answer:
        """The answer with the place at which it really starts."""
        text, start = answer
        if start >= 0 and context.startswith(text, start):
            return text, start
        if context.count(text) != 1:
            there = context[max(start, 0) : max(start, 0) + len(text)]
            raise BadRow(
                self.answers,
                f"got {text!r} at {start}, but the context has {there!r} there, and {text!r} is in it"
                f" {context.count(text)} times",
            )
        return text, context.index(text)


@dataclass(frozen=True)
class _Feature:
    """Question and a piece of the context.

    Args:
        inputs: What the network takes of it.
        spans: For each token the characters of the context that it stands for; 0 to 0 for all but the context's.
        null_position: The token that stands for no answer.
    """

    inputs: dict[str, list[int]]
    spans: list[tuple[int, int]]
    null_position: int

    def texts(self, context: str) -> dict[str, Any]:
        """What it takes to turn tokens back into text: the piece, and the characters of it for each token."""
        there = [span for span in self.spans if span[0] < span[1]]
        first = min((a for a, _ in there), default=0)
        return {
            "text": context[first : max((b for _, b in there), default=0)],
            "char_starts": [a - first if a < b else 0 for a, b in self.spans],
            "char_ends": [b - first if a < b else 0 for a, b in self.spans],
            "null_positions": self.null_position,
        }


def _hold(features: Sequence[_Feature], start: int, end: int) -> list[tuple[int, int] | None]:
    """For each feature the first and last token of an answer, or ``None`` if it does not hold the answer as a whole."""
    touching = [
        [i for i, (a, b) in enumerate(feature.spans) if a < b and a < end and b > start] for feature in features
    ]
    spans = [feature.spans[i] for feature, tokens in zip(features, touching, strict=True) for i in tokens]
    first, last = min((a for a, _ in spans), default=0), max((b for _, b in spans), default=0)
    return [
        (tokens[0], tokens[-1])
        if tokens and feature.spans[tokens[0]][0] == first and feature.spans[tokens[-1]][1] == last
        else None
        for feature, tokens in zip(features, touching, strict=True)
    ]


class _ByQuestion:
    """Rows that follow each other and are of the same question, together."""

    def __init__(self, examples: Any) -> None:
        self._examples = examples
        numbers = examples["question"][:]
        starts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1]]
        self._borders = [*starts, len(numbers)]

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self._examples[i] for i in range(self._borders[index], self._borders[index + 1])]
