"""Rows become examples, which are cached on disk."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from lightning_hift.data.bad_rows import BadRow
from lightning_hift.data.tables import FAULT, PLACE

ROW = "__row__"
"""What an encoder finds in each row beside its columns: its number in the table, from 0."""

Encoder = Callable[[Mapping[str, Any]], list[dict[str, Any]]]
"""Makes examples of a row, or raises a ``BadRow``."""


def encode_table(table: Any, encode: Encoder, key: str, title: str) -> Any:
    """Examples of all rows as a ``datasets.Dataset``, made once and then cached.

    Args:
        table: A ``datasets.Dataset`` with ``PLACE``.
        encode: Makes examples; all of the same columns.
        key: The same wherever the table and what ``encode`` does are.
        title: Of the progress bar.

    Returns:
        All columns of the examples, with ``PLACE`` and ``FAULT``. A row that could not be encoded has a fault, and
        values that mean nothing.
    """

    @cache
    def filling() -> dict[str, Any]:
        """Any example, for rows without: ``datasets`` takes columns and types from the first batch of rows."""
        rows: Iterator[dict[str, Any]] = ({**table[i], ROW: i} for i in range(len(table)))
        return next((example for row in rows for example in _examples(row, encode) if not example[FAULT]), {})

    def encode_rows(rows: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        columns = {**rows, ROW: numbers}
        found = [
            example
            for values in zip(*columns.values(), strict=True)
            for example in _examples(dict(zip(columns, values, strict=True)), encode)
        ]
        found = [{**filling(), **example} if example[FAULT] else example for example in found]
        names = {PLACE: None, FAULT: None} | {name: None for example in found for name in example}
        return {name: [example.get(name) for example in found] for name in names}

    return table.map(
        encode_rows,
        batched=True,
        with_indices=True,
        remove_columns=table.column_names,
        new_fingerprint=key,
        load_from_cache_file=True,
        desc=title,
    )


def _examples(row: Mapping[str, Any], encode: Encoder) -> list[dict[str, Any]]:
    try:
        return [{**example, PLACE: row[PLACE], FAULT: ""} for example in encode(row)]
    except BadRow as fault:
        return [{PLACE: row[PLACE], FAULT: str(fault)}]


def lengths_of(examples: Any) -> list[int]:
    """Tokens of each example of a ``datasets.Dataset``; none of them becomes a Python object."""
    chunks = examples.with_format("arrow")[:].column("input_ids").chunks
    return [length for chunk in chunks for length in chunk.value_lengths().to_pylist()]


def source_of(kind: type, base: type) -> list[str]:
    """What a class and its parents down from ``base`` are written as: their files (in a notebook, their own lines),
    and the version of this library, of which they use more.
    """
    sources = [version("lightning-hift")]
    for part in kind.__mro__:
        if not issubclass(part, base):
            continue
        for place in (sys.modules[part.__module__], part):
            try:
                sources.append(inspect.getsource(place))
                break
            except (OSError, TypeError):
                pass
    return sources


def fingerprint(value: Any) -> str:
    """The same for values that JSON writes the same, in any process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
