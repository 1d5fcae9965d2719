"""Batches of examples of similar length, in an order that can be resumed anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lightning_hift.data.python_source import stable_hash

NO_LABEL = -100
"""In the place of a label: nothing to learn, as in torch and transformers."""

Collate = Callable[[list[Any]], dict[str, Any]]

_BATCHES_PER_BUCKET = 50


class ShuffledExamples:
    """Shuffled batches, an endless stream that is cut into passes and can be resumed anywhere.

    In each pass, examples are shuffled; of every 50 batches' worth, those of similar length share a batch, so that
    little is padded; then the batches are shuffled. Each iteration yields ``len(self)`` batches and goes on where the
    last one, or a loaded state, stopped.

    Args:
        examples: What ``collate`` takes a list of.
        lengths: Tokens of each example; ``None`` shuffles without regard to length.
        batch_size: Examples per batch. The last batch of a pass may be smaller.
        seed: Each pass is shuffled by this seed and its number.
        collate: Makes a batch.
        fingerprint: What must be the same for a saved state to mean the same.
        rank: Number of this process among those that train together.
        world_size: Number of those processes. Each gets other batches, and as many: if there are not enough in a pass,
            the last ones get those with which it began.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        lengths: Sequence[int] | None,
        batch_size: int,
        seed: int,
        collate: Collate,
        fingerprint: Mapping[str, Any],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._examples = examples
        self._lengths = None if lengths is None else torch.as_tensor(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._collate = collate
        self._rank = rank
        self._world_size = world_size
        sizes = {"num_examples": len(examples), "batch_size": batch_size, "world_size": world_size}
        self._fingerprint = {**fingerprint, **sizes, "seed": seed}
        self._position = 0

    def __len__(self) -> int:
        return -(-len(self._examples) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        shuffled_pass, batches = -1, list[list[int]]()
        for _ in range(len(self)):
            current_pass, place = divmod(self._position, len(self))
            if current_pass != shuffled_pass:
                shuffled_pass, batches = current_pass, self._shuffle(current_pass)
            self._position += 1
            mine = batches[(place * self._world_size + self._rank) % len(batches)]
            yield self._collate([self._examples[i] for i in mine])

    def state_dict(self) -> dict[str, Any]:
        """The number of the next batch, counted from the start of training, and what gives it its meaning."""
        return {"position": self._position, **self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ValueError: It was taken from other data, or with other settings.
        """
        saved = {key: state_dict.get(key) for key in self._fingerprint}
        differing = [key for key, value in saved.items() if value != self._fingerprint[key]]
        if differing:
            there, here = ({key: values[key] for key in differing} for values in (saved, self._fingerprint))
            raise ValueError(
                f"The checkpoint has other training data, {there}, than this run, {here}. Use the checkpoint's settings"
                " to resume, or load only the weights to start a new run."
            )
        self._position = state_dict["position"]

    def step_back(self) -> None:
        """Give the last batch once more, as training was interrupted while it was under way."""
        self._position -= 1

    def _shuffle(self, number: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(stable_hash(f"{self._seed}/{number}"))
        order = torch.randperm(len(self._examples), generator=generator)
        if self._lengths is not None:
            buckets = torch.split(order, self._batch_size * _BATCHES_PER_BUCKET)
            order = torch.cat([bucket[self._lengths[bucket].argsort(stable=True)] for bucket in buckets])
        batches = torch.split(order, self._batch_size)
        return [batches[i].tolist() for i in torch.randperm(len(batches), generator=generator).tolist()]


class OrderedExamples:
    """The same batches in the same order at each iteration; the last one may be smaller.

    Args:
        examples: What ``collate`` takes a list of.
        batch_size: Examples per batch.
        collate: Makes a batch.
        rank: Number of this process among those that evaluate together.
        world_size: Number of those processes. Each gets other batches, one perhaps one more than another; none twice.

    Raises:
        ValueError: There are fewer batches than processes; one without any would wait for the others forever.
    """

    def __init__(
        self, examples: Sequence[Any], batch_size: int, collate: Collate, rank: int = 0, world_size: int = 1
    ) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._collate = collate
        self._starts = range(0, len(examples), batch_size)[rank::world_size]
        if world_size > 1 and len(examples) <= batch_size * (world_size - 1):
            raise ValueError(
                f"Got {len(examples)} examples to evaluate in batches of {batch_size} by {world_size} processes, of"
                " which each needs a batch. Give a smaller eval_batch_size, or evaluate with devices=1."
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in self._starts:
            stop = min(start + self._batch_size, len(self._examples))
            yield self._collate([self._examples[i] for i in range(start, stop)])
