"""Sentences as lists of words, with a tag for each word."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_hift.data.bad_rows import BadRow
from lightning_hift.data.batches import NO_LABEL
from lightning_hift.data.classification import check_order, label_index, labels_of_model
from lightning_hift.data.text import TRUNCATED, Split, TextDataModule
from lightning_hift.data.tokenizer import need_offsets

_LOST = "__lost__"  # column: how many tagged words were cut off


class TokenClassificationDataModule(TextDataModule):
    """Rows of a list of words and a list of tags, from the hub or from json, parquet or CoNLL column files.

    The network reads the words as one text, with ``separator`` between them. A batch is a mapping of what the
    tokenizer gives, of shape (batch, length), and, of the same shape, ``labels``: indices of tags, -100 where a token
    has none, and ``word_numbers``: which word begins at a token, counted from 1, and 0 elsewhere; and ``num_words``,
    shape (batch,). Words of which the tokenizer makes nothing have no token and no label. Sentences longer than
    ``max_length`` are cut; a warning counts them and the words lost.

    Args:
        words: Column of the words.
        tags: Column of the tags; rows to predict need none.
        label_names: Tags in the order of their indices; a tag is one of these names, or an index. Default: what the
            data set declares, or the tags found in training, sorted; without training rows, those of the model.
        label_all_tokens: A word's tag labels all its tokens, not only the first.
        separator: Between words; ``""`` for languages that write none.
        kwargs: See ``TextDataModule``.

    Raises:
        ValueError: See ``TextDataModule``; or the tokenizer does not know which characters a token stands for.
    """

    columns_needed = ("words",)
    target_columns = ("tags",)

    def __init__(
        self,
        *,
        words: str = "words",
        tags: str = "tags",
        label_names: list[str] | None = None,
        label_all_tokens: bool = False,
        separator: str = " ",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.words = words
        self.tags = tags
        self.given_label_names = label_names
        self.label_all_tokens = label_all_tokens
        self.separator = separator

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the tags in the order of their indices."""
        if self.given_label_names is not None:
            return [str(name) for name in self.given_label_names]
        if not self._has("train"):
            return labels_of_model(self)
        table = self.table("train")
        declared = self._declared(table)
        if declared is not None:
            return list(declared)
        found = {tag for tags in table[self.tags] if isinstance(tags, list) for tag in tags if tag not in (None, "")}
        return [str(tag) for tag in sorted(found)]

    @override
    def select(self, split: Split, table: Any) -> Any:
        if self.given_label_names is not None and self.tags in table.column_names:
            check_order(self.given_label_names, self._declared(table))
        return super().select(split, table)

    @override
    def encoding_options(self) -> dict[str, Any]:
        return {
            "columns": [self.words, self.tags],
            "label_names": self.label_names,
            "label_all_tokens": self.label_all_tokens,
            "separator": self.separator,
        }

    @override
    def encode(self, row: Mapping[str, Any], split: Split) -> list[dict[str, Any]]:
        words = _words_in(row, self.words)
        indices = None if split == "predict" else self._tags_in(row, len(words))
        encoded, words_of_tokens = self._tokenize(words)
        is_long = len(encoded["input_ids"]) > self.max_length
        there = {word for word in words_of_tokens if word is not None}
        if is_long:
            encoded, words_of_tokens = self._tokenize(words, truncation=True, max_length=self.max_length)
        lost = there.difference(words_of_tokens)
        if there == lost:
            raise BadRow(
                self.words,
                f"max_length={self.max_length} leaves none of its words"
                if there
                else "the tokenizer makes nothing of them",
            )
        numbers = _numbers_at_first_tokens(words_of_tokens)
        example = {**encoded, "word_numbers": numbers, "num_words": len(words), TRUNCATED: is_long, _LOST: len(lost)}
        if indices is not None:
            example["labels"] = [
                indices[word] if word is not None and (number or self.label_all_tokens) else NO_LABEL
                for word, number in zip(words_of_tokens, numbers, strict=True)
            ]
        return [example]

    @override
    def count_cut(self, split: Split, examples: Any) -> None:
        super().count_cut(split, examples)
        lost = sum(examples[_LOST])
        if lost:
            rank_zero_warn(f"{lost} {split} words were cut off with their tags.")

    def _declared(self, table: Any) -> list[str] | None:
        return getattr(getattr(table.features[self.tags], "feature", None), "names", None)

    def _tokenize(self, words: Sequence[str], **options: Any) -> tuple[dict[str, Any], list[int | None]]:
        """What the tokenizer makes of the words, and to which of them each token belongs, if to any."""
        starts = [0, *itertools.accumulate(len(word) + len(self.separator) for word in words[:-1])]
        ends = [start + len(word) for start, word in zip(starts, words, strict=True)]
        encoded = need_offsets(self.tokenizer)(self.separator.join(words), return_offsets_mapping=True, **options)

        def word_of(first: int, end: int) -> int | None:
            """The first word that has characters in common with a token, which may begin with a separator."""
            word = bisect.bisect_right(ends, first)
            return word if word < len(words) and starts[word] < end else None

        words_of_tokens = [word_of(first, end) for first, end in encoded.pop("offset_mapping")]
        return dict(encoded), words_of_tokens

    def _tags_in(self, row: Mapping[str, Any], num_words: int) -> list[int]:
        tags = row.get(self.tags)
        if not isinstance(tags, list):
            raise BadRow(self.tags, "there are no tags" if tags is None else f"got {tags!r}, which is no list of tags")
        if len(tags) != num_words:
            raise BadRow(self.tags, f"there are {len(tags)} tags for {num_words} words")
        return [label_index(tag, self.label_names, self.tags) for tag in tags]


def _words_in(row: Mapping[str, Any], column: str) -> list[str]:
    words = row[column]
    if not words:
        raise BadRow(column, "there are no words")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise BadRow(column, f"got {words!r}, which is no list of words")
    return words


def _numbers_at_first_tokens(words_of_tokens: Sequence[int | None]) -> list[int]:
    """For each token the number of the word that begins there, counted from 1, or 0."""
    seen: set[int | None] = {None}
    numbers = []
    for word in words_of_tokens:
        numbers.append(0 if word is None or word in seen else word + 1)
        seen.add(word)
    return numbers
