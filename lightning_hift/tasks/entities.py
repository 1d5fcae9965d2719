"""Entities that tags like B-PER and I-PER mark, and how many of them are found."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

Entity = tuple[str, int, int]
"""Type, first word, last word."""

_TAG = re.compile(r"([BIESLU])(?:-(.+))?")
_FIRST, _LAST = frozenset("BSU"), frozenset("ESLU")  # BILOU says L and U where BIOES says E and S


def mark_entities(names: Sequence[str]) -> bool:
    """Whether tags are those of a BIO, IOB1, BIOES or BILOU scheme, rather than plain ones like parts of speech."""
    return "O" in names and len(names) > 1 and all(name == "O" or _TAG.fullmatch(name) for name in names)


def entities_in(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, as conlleval and seqeval's default mode find them.

    A word goes on with the entity before it if its tag says so (I, E, L), the type is the same, and the tag before did
    not end it (E, S, L, U); otherwise it begins one. So an I- that has nothing to go on with begins an entity, as in
    IOB1, and every sequence of tags means something.

    Args:
        tags: One per word: ``"O"``, or a letter of B, I, E, S, L, U with the type behind a hyphen, or without a type.
    """
    found: list[Entity] = []
    open_type: str | None = None  # of the entity that the next word could go on with
    for i, tag in enumerate(tags):
        match = _TAG.fullmatch(tag)
        if match is None:
            open_type = None
            continue
        letter, entity_type = match[1], match[2] or ""
        if letter in _FIRST or entity_type != open_type:
            found.append((entity_type, i, i))
        else:
            found[-1] = (entity_type, found[-1][1], i)
        open_type = None if letter in _LAST else entity_type
    return found


class EntityScores(Metric):
    """Precision, recall and F1 of entities, each right if its type, its first and its last word are.

    Over all entities of all types together. Without any entity, what would be a division by zero is 0.

    Args:
        names: Tags in the order of their indices.
    """

    full_state_update = False
    higher_is_better = True

    num_right: Tensor
    num_predicted: Tensor
    num_true: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        for state in ("num_right", "num_predicted", "num_true"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Count entities.

        Args:
            predicted: Indices of tags, shape (batch, length).
            true: Likewise; what is negative is no word, and is passed over.
        """
        num_right = num_predicted = num_true = 0
        for guesses, answers in zip(predicted.tolist(), true.tolist(), strict=True):
            words = [(guess, answer) for guess, answer in zip(guesses, answers, strict=True) if answer >= 0]
            found = set(entities_in([self.names[guess] for guess, _ in words]))
            there = set(entities_in([self.names[answer] for _, answer in words]))
            num_right += len(found & there)
            num_predicted += len(found)
            num_true += len(there)
        self.num_right += num_right
        self.num_predicted += num_predicted
        self.num_true += num_true

    @override
    def compute(self) -> dict[str, Tensor]:
        def share(part: Tensor, whole: Tensor) -> Tensor:
            return part / whole.clamp(min=1)

        return {
            "precision": share(self.num_right, self.num_predicted),
            "recall": share(self.num_right, self.num_true),
            "f1": share(2 * self.num_right, self.num_predicted + self.num_true),
        }
