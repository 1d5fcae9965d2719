"""Answers from scores of tokens in the plainest way: every pair of tokens of every row of a question."""

from __future__ import annotations

from typing import Any

from torchmetrics.functional.text import squad


def answer(rows: list[dict[str, Any]], max_tokens: int, null_threshold: float | None) -> str:
    """The best span of all rows of one question; each has lists ``starts``, ``ends``, ``spans``, and ``text``."""
    best, best_text, null = float("-inf"), "", float("inf")
    for row in rows:
        null = min(null, row["starts"][row["null"]] + row["ends"][row["null"]])
        for i, (first, _) in enumerate(row["spans"]):
            for j, (_, last) in enumerate(row["spans"]):
                is_context = row["spans"][i][1] > row["spans"][i][0] and row["spans"][j][1] > row["spans"][j][0]
                if is_context and i <= j < i + max_tokens and row["starts"][i] + row["ends"][j] > best:
                    best, best_text = row["starts"][i] + row["ends"][j], row["text"][first:last].strip()
    return "" if null_threshold is not None and null - best > null_threshold else best_text


def scores(answers: dict[str, str], true: dict[str, list[str]]) -> dict[str, float]:
    found = squad(
        [{"prediction_text": text, "id": name} for name, text in answers.items()],
        [{"answers": {"answer_start": [0] * len(texts), "text": texts}, "id": name} for name, texts in true.items()],
    )
    return {name: float(value) / 100 for name, value in found.items()}
