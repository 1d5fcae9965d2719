"""Texts or pairs of texts with a class or a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from typing_extensions import override

from lightning_hift.data.bad_rows import BadRow
from lightning_hift.data.text import TRUNCATED, Split, TextDataModule


class ClassificationDataModule(TextDataModule):
    """Rows of a text, or a pair of texts, and a label.

    A batch is a mapping of what the tokenizer gives (``input_ids`` and ``attention_mask``, perhaps
    ``token_type_ids``, shape (batch, length)) and ``labels``, shape (batch,): class indices or floats.

    Args:
        text: Column of the text.
        text_pair: Column of a second text.
        label: Column of the label; rows to predict need none.
        label_names: Classes in the order of their indices; a label is one of these names, or, unless names are
            numbers, an index. Default: what the data set declares, or the labels found in training, sorted;
            without training rows, those of the model.
        regression: The label is a number.
        shots_per_class: Train on so many rows of each class only, drawn by ``seed``: few-shot learning.
        kwargs: See ``TextDataModule``.

    Raises:
        ValueError: See ``TextDataModule``; or there are ``label_names`` for a regression.
    """

    columns_needed: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    target_columns: ClassVar[tuple[str, ...]] = ("label",)

    def __init__(
        self,
        *,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        label_names: list[str] | None = None,
        regression: bool = False,
        shots_per_class: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if regression and label_names is not None:
            raise ValueError(f"Got label_names={label_names} with regression=True, which has none. Leave one out.")
        if shots_per_class is not None and (shots_per_class < 1 or regression):
            raise ValueError(
                f"Got shots_per_class={shots_per_class}; it must be at least 1, and there must be classes."
            )
        self.shots_per_class = shots_per_class
        self.text = text
        self.text_pair = text_pair
        self.label = label
        self.regression = regression
        self.given_label_names = label_names

    @cached_property
    def label_names(self) -> list[str] | None:
        """Names of the classes in the order of their indices; ``None`` for a regression."""
        if self.regression:
            return None
        if self.given_label_names is not None:
            return [str(name) for name in self.given_label_names]
        if not self._has("train"):
            return labels_of_model(self)
        table = self.table("train")
        names = getattr(table.features[self.label], "names", None)
        if names is not None:
            return list(names)
        found = {value for value in table.unique(self.label) if value not in (None, "")}
        return [str(value) for value in sorted(found)]

    @override
    def select(self, split: Split, table: Any) -> Any:
        if self.given_label_names is not None and self.label in table.column_names:
            check_order(self.given_label_names, getattr(table.features[self.label], "names", None))
        table = super().select(split, table)
        if self.shots_per_class is None or split != "train":
            return table
        rows: dict[Any, list[int]] = {}
        labels = table[self.label]
        for i in torch.randperm(len(table), generator=torch.Generator().manual_seed(self.seed)).tolist():
            rows.setdefault(labels[i], []).append(i)
        short = {label: len(found) for label, found in rows.items() if len(found) < self.shots_per_class}
        if short:
            raise ValueError(f"Got shots_per_class={self.shots_per_class}, but of these there are fewer rows: {short}.")
        return table.select(sorted(i for found in rows.values() for i in found[: self.shots_per_class]))

    @override
    def encoding_options(self) -> dict[str, Any]:
        return {
            "columns": [self.text, self.text_pair, self.label],
            "label_names": self.label_names,
            "regression": self.regression,
        }

    @override
    def encode(self, row: Mapping[str, Any], split: Split) -> list[dict[str, Any]]:
        texts = [text_in(row, column) for column in (self.text, self.text_pair) if column is not None]
        encoded = self.tokenizer(*texts)
        is_long = len(encoded["input_ids"]) > self.max_length
        if is_long:
            encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        example = {**encoded, TRUNCATED: is_long}
        if split != "predict":
            example["labels"] = self.read_label(row)
        return [example]

    def read_label(self, row: Mapping[str, Any]) -> int | float:
        """The class index, or the number.

        Raises:
            BadRow: It is neither.
        """
        value = row.get(self.label)
        if value is None or value == "":
            raise BadRow(self.label, "there is no label")
        if self.regression:
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise BadRow(self.label, f"got {value!r}, which is no number")
            return number
        assert self.label_names is not None
        return label_index(value, self.label_names, self.label)


def check_order(given: Sequence[str], declared: Sequence[str] | None) -> None:
    """Refuse names that a data set has in another order: its labels are indices in its own.

    Raises:
        ValueError: They are the same in another order.
    """
    names = [str(name) for name in given]
    if declared is not None and names != list(declared) and sorted(names) == sorted(declared):
        raise ValueError(
            f"Got the labels {', '.join(names)}, but the data set's are indices of {', '.join(declared)}. Give them in"
            " the data set's order, or leave label_names out."
        )


def labels_of_model(data: TextDataModule) -> list[str]:
    """Names of the classes where there are no training rows: those that the module's model was saved with.

    Raises:
        ValueError: It was saved without names.
    """
    module = None if data.trainer is None else data.trainer.lightning_module
    saved = {} if getattr(module, "source", None) is None else getattr(module.config, "id2label", {})  # type: ignore[union-attr]
    names = [str(name) for name in saved.values()]
    if not names or names == [f"LABEL_{i}" for i in range(len(names))]:
        raise ValueError(
            "Got no label_names, no training rows to find them in, and no model that was saved with them. Give"
            " label_names, in the order of training, or the file of training rows."
        )
    return names


def label_index(value: Any, names: Sequence[str], column: str) -> int:
    """The index of a label that is a name, or an index itself, perhaps written as a number.

    Where names are numbers themselves, a number is a name.

    Raises:
        BadRow: It is neither.
    """
    if str(value) in names:
        return names.index(str(value))
    is_index = isinstance(value, int) or (isinstance(value, str) and value.isdecimal())
    index = int(value) if is_index and not any(name.isdecimal() for name in names) else -1
    if not 0 <= index < len(names):
        raise BadRow(column, f"got {value!r}; it must be one of {', '.join(names)}")
    return index


def text_in(row: Mapping[str, Any], column: str) -> str:
    """The text in a column.

    Raises:
        BadRow: It is empty, or no text.
    """
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise BadRow(column, "there is no text" if value in (None, "") else f"got {value!r}, which is no text")
    return value
