"""Several documents in one row, so that little is padded, without one seeing the other.

Note on how documents are kept apart: ``position_ids`` begin at 0 with each document, and there is no attention mask.
From that, transformers makes a mask of blocks for "sdpa", "eager" and "flex_attention", and calls flash attention with
the lengths of the documents (there, for batches of one row only). The first token of a document has no label, as it
would be predicted from the last token of another one. What is left of a row is padding, a document of its own without
labels. Whether a network heeds all this is tried by ``tasks.packing_trial``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_hift.data.batches import NO_LABEL
from lightning_hift.data.python_source import stable_hash

Contamination = Literal["refuse", "allow"]

_WINDOW = 1024


def first_fit_decreasing(
    lengths: Sequence[int], capacity: int, seed: int = 0, window: int = _WINDOW
) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most ``capacity``.

    The indices are shuffled by ``seed`` and taken ``window`` at a time; of these, the longest first, each goes to the
    first row that has room. So each row is a sample of all lengths, and the work grows with the number of indices.

    Args:
        lengths: Tokens of each document.
        capacity: Most tokens per row.
        seed: Of the shuffle; the same seed gives the same rows.
        window: How many documents are packed at a time.

    Raises:
        ValueError: A document is longer than a row.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"Got a document of {max(lengths)} tokens for rows of {capacity}. Cut it, or use longer rows.")
    generator = torch.Generator().manual_seed(stable_hash(f"{seed}/packing"))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        room: list[int] = []
        filled: list[list[int]] = []
        for i in sorted(order[start : start + window], key=lambda i: -lengths[i]):
            place = next((place for place, free in enumerate(room) if free >= lengths[i]), len(room))
            if place == len(room):
                room.append(capacity)
                filled.append([])
            room[place] -= lengths[i]
            filled[place].append(i)
        rows += filled
    return rows


class PackedExamples:
    """Rows of several examples each; packed once, so that an epoch always has the same number of rows.

    Args:
        examples: Mappings with ``input_ids``.
        rows: Indices of the examples of each row.
    """

    def __init__(self, examples: Any, rows: Sequence[Sequence[int]]) -> None:
        self._examples = examples
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[Any]:
        return [self._examples[i] for i in self._rows[index]]


def join_documents(
    rows: Sequence[Sequence[Mapping[str, Any]]], pad_token_id: int, contamination: Contamination = "refuse"
) -> dict[str, Tensor]:
    """A batch of rows of documents: ``input_ids``, ``labels`` and ``position_ids``, shape (rows, length).

    Args:
        rows: Of each row its documents: ``input_ids``, and ``labels`` if these are not the same.
        pad_token_id: Fills rows up to the longest.
        contamination: ``"allow"``: without ``position_ids``, so that a document sees those before it in its row.
    """
    width = max(sum(len(document["input_ids"]) for document in row) for row in rows)
    tokens = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), NO_LABEL)
    positions = torch.empty(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = 0
        for document in row:
            ids = torch.as_tensor(document["input_ids"])
            stop = start + len(ids)
            tokens[i, start:stop] = ids
            labels[i, start:stop] = torch.as_tensor(document.get("labels", ids))
            positions[i, start:stop] = torch.arange(len(ids))
            if contamination == "refuse":
                labels[i, start] = NO_LABEL
            start = stop
        positions[i, start:] = torch.arange(width - start)
    batch = {"input_ids": tokens, "labels": labels}
    return batch if contamination == "allow" else {**batch, "position_ids": positions}


class TokenBlocks:
    """A stream of documents cut into blocks of equal length; a block is a row of pieces of documents.

    No token is left out, but for one that is alone in the last block, where there is nothing to predict it from. The
    last block may be shorter. Tokens stay on disk until a block is asked for.

    Args:
        documents: A ``datasets.Dataset`` with ``input_ids``.
        length: Tokens per block.
    """

    def __init__(self, documents: Any, length: int) -> None:
        import numpy as np

        chunks = documents.with_format("arrow")[:].column("input_ids").chunks
        lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
        self._tokens = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
        self._chunk_ends = np.cumsum([len(tokens) for tokens in self._tokens])
        self._ends = np.cumsum(np.concatenate(lengths))  # of documents, in the stream
        self._length = length

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        return (self.num_tokens + self._length - 2) // self._length

    def __getitem__(self, index: int) -> list[dict[str, Tensor]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._length
        stop = min(start + self._length, self.num_tokens)
        first, last = self._ends.searchsorted([start, stop - 1], side="right")
        edges = [start, *self._ends[first:last].tolist(), stop]
        return [{"input_ids": self._read(*edge)} for edge in pairwise(edges)]

    def _read(self, start: int, stop: int) -> Tensor:
        parts: list[Tensor] = []
        while start < stop:
            chunk = int(self._chunk_ends.searchsorted(start, side="right"))
            begin = int(self._chunk_ends[chunk]) - len(self._tokens[chunk])
            end = min(stop, int(self._chunk_ends[chunk]))
            parts.append(torch.tensor(self._tokens[chunk][start - begin : end - begin]))
            start = end
        return torch.cat(parts).long()
