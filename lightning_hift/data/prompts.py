"""Tokens of a source and a target, for networks that continue the source and for those that encode it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hift.data.batches import NO_LABEL
from lightning_hift.data.pretraining import with_end
from lightning_hift.data.text import TRUNCATED

TARGET_CUT = "__target_cut__"
"""Column of encoded examples: whether the target is not whole."""


class PromptEncoder:
    """For networks that only decode: source, separator, target and end in one sequence.

    The parts are made into tokens one by one, so that the prompt to generate from is the beginning of what was trained.

    Args:
        tokenizer: What it puts before a text is put before the source.
        separator: Between source and target.
        max_length: Most tokens of all together.
        room: Tokens of ``max_length`` that prompts leave free to be generated.

    Raises:
        ValueError: ``max_length`` leaves nothing for the source; the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, separator: str, max_length: int, room: int) -> None:
        with_end(tokenizer, [])
        self._tokenizer = tokenizer
        self._start = _put_before(tokenizer)
        self._separator = self._tokens(separator)
        self._max_length = max_length
        self._room = room
        self._free = max_length - len(self._start) - len(self._separator)
        if self._free <= room:
            raise ValueError(
                f"Got max_length={max_length}, of which {len(self._start) + len(self._separator)} tokens are for the"
                f" separator and what a text begins with, and {room} are to be generated (max_new_tokens). Nothing is"
                " left for the source: allow more tokens, or generate fewer."
            )

    @property
    def options(self) -> dict[str, Any]:
        """What its results depend on."""
        return {"separator": self._separator, "room": self._room, "has_encoder": False}

    def example(self, source: str, target: str) -> dict[str, Any]:
        """``input_ids`` and ``labels``, and whether source or target were cut."""
        answer = with_end(self._tokenizer, self._tokens(target))
        kept = answer[: self._free]
        prompt, source_cut = self._prompt(source, self._free - len(kept))
        return {
            "input_ids": prompt + kept,
            "labels": [NO_LABEL] * len(prompt) + kept,
            TRUNCATED: source_cut,
            TARGET_CUT: len(kept) < len(answer),
        }

    def prompt(self, source: str) -> tuple[list[int], bool]:
        """Tokens to generate from, and whether the source was cut."""
        return self._prompt(source, self._free - self._room)

    def prompts(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """A batch to generate from, padded on the left, so that each row ends where its answer begins."""
        return _padded(rows, self._tokenizer.pad_token_id, on_the_left=True)

    def _prompt(self, source: str, limit: int) -> tuple[list[int], bool]:
        tokens = self._tokens(source)
        kept = tokens if len(tokens) <= limit else _cut(tokens, limit, self._tokenizer.truncation_side)
        return self._start + kept + self._separator, len(kept) < len(tokens)

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class PairEncoder:
    """For networks with an encoder: the source is read, the target is written.

    Args:
        tokenizer: Adds what it adds to either.
        max_length: Most tokens of each.

    Raises:
        ValueError: The tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        with_end(tokenizer, [])
        self._tokenizer = tokenizer
        self._max_length = max_length

    @property
    def options(self) -> dict[str, Any]:
        """What its results depend on."""
        return {"has_encoder": True}

    def example(self, source: str, target: str) -> dict[str, Any]:
        """``input_ids`` and ``labels``, and whether source or target were cut."""
        tokens, source_cut = self.prompt(source)
        answer = with_end(self._tokenizer, list(self._tokenizer(text_target=target, verbose=False)["input_ids"]))
        return {
            "input_ids": tokens,
            "labels": answer[: self._max_length],
            TRUNCATED: source_cut,
            TARGET_CUT: len(answer) > self._max_length,
        }

    def prompt(self, source: str) -> tuple[list[int], bool]:
        """Tokens of the source, and whether it was cut."""
        tokens = list(self._tokenizer(source, verbose=False)["input_ids"])
        if len(tokens) <= self._max_length:
            return tokens, False
        return list(self._tokenizer(source, truncation=True, max_length=self._max_length)["input_ids"]), True

    def prompts(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """A batch to generate from."""
        return _padded(rows, self._tokenizer.pad_token_id, on_the_left=False)


def _put_before(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer puts before each text, such as a beginning-of-sequence token."""
    whole, bare = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start]


def _cut(tokens: list[int], limit: int, side: str) -> list[int]:
    return tokens[len(tokens) - limit :] if side == "left" else tokens[:limit]


def _padded(rows: Sequence[Sequence[int]], pad_token_id: int, on_the_left: bool) -> dict[str, Tensor]:
    width = max(map(len, rows))

    def fill(row: Sequence[int], value: int) -> list[int]:
        padding = [value] * (width - len(row))
        return [*padding, *row] if on_the_left else [*row, *padding]

    return {
        "input_ids": torch.tensor([fill(row, pad_token_id) for row in rows]),
        "attention_mask": torch.tensor([fill([1] * len(row), 0) for row in rows]),
    }
