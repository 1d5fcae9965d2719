"""Seconds per step of HiFT against full fine-tuning and against a loop written by hand, paired in one run.

``python -m lightning_hift.benchmark.speed`` trains a randomly initialised BERT of MiniLM's shape (6 layers, hidden size
384, vocabulary 30522) on random tokens. Each round runs all variants one after the other for two sweeps of steps, so
that whatever else the machine does falls on all of them; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hift.benchmark.passport import versions
from lightning_hift.callback import HiFTCallback
from lightning_hift.grouping import find_layer_units
from lightning_hift.table import format_table

BATCH_SIZE, SEQUENCE_LENGTH, VOCABULARY, CLASSES = 32, 64, 30522, 6
WARM_UP_STEPS = 2


def build_model() -> nn.Module:
    """A BERT classifier of MiniLM's shape with random weights; no dropout, so that all variants do the same work."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)  # type: ignore[no-any-return]


def make_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """``count`` batches of tokens, shape (32, 64), and labels, shape (32,)."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(VOCABULARY, (BATCH_SIZE, SEQUENCE_LENGTH), generator=generator),
            torch.randint(CLASSES, (BATCH_SIZE,), generator=generator),
        )
        for _ in range(count)
    ]


class Classifier(pl.LightningModule):
    """The model in plain Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[1]).loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


class StepTimes(pl.Callback):
    """The time at which each batch begins; the last one ends with the epoch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.times.append(time.perf_counter())

    def on_train_epoch_end(self, *args: Any) -> None:
        self.times.append(time.perf_counter())


def run_lightning(batches: Sequence[tuple[Tensor, Tensor]], callbacks: Sequence[pl.Callback] = ()) -> list[float]:
    """Seconds of each step in a Trainer, from the beginning of one batch to that of the next."""
    times = StepTimes()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, times],
    )
    trainer.fit(Classifier(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return [after - before for before, after in pairwise(times.times)]


def run_by_hand(batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Seconds of each step in a plain loop with one AdamW per group, written for this model alone."""
    model = build_model()
    model.train()
    groups = [list(unit.parameters.values()) for unit in find_layer_units(model)]
    optimizers = [torch.optim.AdamW(group, lr=1e-5) for group in groups]
    times = []
    for step, (tokens, labels) in enumerate(batches):
        times.append(time.perf_counter())
        model.requires_grad_(False)
        for p in groups[step % len(groups)]:
            p.requires_grad_(True)
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizers[step % len(groups)].step()
        optimizers[step % len(groups)].zero_grad()
    times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times)]


VARIANTS: dict[str, Callable[[Sequence[tuple[Tensor, Tensor]]], list[float]]] = {
    "full fine-tuning, plain Lightning": run_lightning,
    "one group, lightning_hift": lambda batches: run_lightning(batches, [HiFTCallback(group_size=100)]),
    "HiFT, loop by hand": run_by_hand,
    "HiFT, lightning_hift": lambda batches: run_lightning(batches, [HiFTCallback()]),
}
FULL, ONE_GROUP, BY_HAND, HIFT = VARIANTS


def measure(rounds: int, sweeps: int = 2) -> dict[str, list[list[float]]]:
    """Seconds of each step, by variant and round, for whole sweeps. The order of the variants rotates."""
    length = len(find_layer_units(build_model()))
    # The steps before the last whole sweeps are warm-up: they allocate gradients and state.
    batches = make_batches(WARM_UP_STEPS + (sweeps + 1) * length)
    results: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    names = list(VARIANTS)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times = VARIANTS[name](batches)[-sweeps * length :]
            results[name].append(times)
            print(f"round {i + 1}/{rounds}  {name}: {1000 * statistics.mean(times):.0f} ms per step", flush=True)
    return {name: [_by_place(times, length) for times in runs] for name, runs in results.items()}


def _by_place(times: list[float], length: int) -> list[float]:
    """The fastest of the steps at each place in the sweep: what else the machine did only ever adds to a time."""
    return [min(times[place::length]) for place in range(length)]


def report(results: dict[str, list[list[float]]]) -> str:
    """A table of mean seconds per step over a sweep (medians over the rounds), and ratios within rounds (medians)."""
    means = {name: [statistics.mean(places) for places in runs] for name, runs in results.items()}

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(means[above], means[below], strict=True))

    rows = [
        [name, f"{1000 * statistics.median(times):.0f}", f"{ratio(FULL, name):.2f}"] for name, times in means.items()
    ]
    return "\n".join(
        [
            format_table(["variant", "ms per step", "speed against full"], rows),
            "",
            f"HiFT through lightning_hift against full fine-tuning: {ratio(FULL, HIFT):.2f}x (target 1.70x or more)",
            f"HiFT through lightning_hift against the loop by hand: {100 * (ratio(HIFT, BY_HAND) - 1):+.1f} %"
            " time per step (target +3 % or less)",
            f"One group against plain Lightning: {100 * (ratio(ONE_GROUP, FULL) - 1):+.1f} % time per step"
            " (target +3 % or less)",
        ]
    )


def passport(rounds: int) -> str:
    """What the numbers were measured on."""
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    return (
        f"BERT, 6 layers, hidden 384, vocabulary {VOCABULARY}, fp32, AdamW, batch {BATCH_SIZE} x {SEQUENCE_LENGTH};"
        f" {torch.get_num_threads()} threads, {platform.machine()}, {packages};"
        f" {rounds} rounds of two sweeps, the faster step at each place, medians of rounds, ratios within a"
        f" round, {WARM_UP_STEPS} steps and one sweep of warm-up each"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of all variants")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    results = measure(arguments.rounds)
    text = f"{report(results)}\n\n{passport(arguments.rounds)}"
    print(f"\n{text}")
    if arguments.output is not None:
        arguments.output.write_text(f"```text\n{text}\n```\n")


if __name__ == "__main__":
    main()
