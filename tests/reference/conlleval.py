"""Entities by the rules of conlleval as published: does a chunk end here, does one start here, asked at each border."""

from __future__ import annotations


def _split(tag: str) -> tuple[str, str]:
    letter, _, entity_type = tag.partition("-")
    return {"L": "E", "U": "S"}.get(letter, letter), entity_type


def _ends(before: tuple[str, str], here: tuple[str, str]) -> bool:
    (b, b_type), (h, h_type) = before, here
    if b in ("E", "S"):
        return True
    if b in ("B", "I") and h in ("B", "S", "O"):
        return True
    return b != "O" and b_type != h_type


def _starts(before: tuple[str, str], here: tuple[str, str]) -> bool:
    (b, b_type), (h, h_type) = before, here
    if h in ("B", "S"):
        return True
    if b in ("E", "S", "O") and h in ("E", "I"):
        return True
    return h != "O" and b_type != h_type


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    found = []
    start = 0
    before = ("O", "")
    for i, here in enumerate([*map(_split, tags), ("O", "")]):
        if _ends(before, here):
            found.append((before[1], start, i - 1))
        if _starts(before, here):
            start = i
        before = here
    return found


def scores(predicted: list[list[str]], true: list[list[str]]) -> dict[str, float]:
    right = num_predicted = num_true = 0
    for guesses, answers in zip(predicted, true, strict=True):
        found, there = entities(guesses), entities(answers)
        right += sum(entity in there for entity in found)
        num_predicted += len(found)
        num_true += len(there)
    precision = right / num_predicted if num_predicted else 0.0
    recall = right / num_true if num_true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}
