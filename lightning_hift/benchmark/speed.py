"""The kind ``"speed"``: seconds per step of HiFT, of full fine-tuning, and of a loop written by hand, on the CPU.

A cell trains a randomly initialised BERT of MiniLM's shape (6 layers, hidden size 384, vocabulary 30522) on random
tokens. Its options are ``variant`` (see ``VARIANTS``) and ``round``; and, as one likes, ``sweeps`` (how many to
measure; default: 2) and ``tiny`` (a tiny model: it proves the program, not the targets). The variants of one round
follow each other, so that whatever else the machine does falls on all of them; ratios are taken within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hift.benchmark.cell_process import MEASURED
from lightning_hift.benchmark.kinds import check_options
from lightning_hift.benchmark.matrix import Benchmark, Cell
from lightning_hift.benchmark.records import Record
from lightning_hift.benchmark.report import number_text, write_tables
from lightning_hift.groups.grouping import find_layer_units
from lightning_hift.plugin.callback import HiFTCallback
from lightning_hift.table import format_markdown

Batches = Sequence[tuple[Tensor, Tensor]]
CLASSES = 6
WARM_UP_STEPS = 2  # before a whole sweep of warm-up, which allocates gradients and state


class Size(NamedTuple):
    """Of the model and of its batches."""

    layers: int = 6
    hidden: int = 384
    vocabulary: int = 30522
    batch: int = 32
    length: int = 64


SIZE, TINY = Size(), Size(layers=1, hidden=32, vocabulary=64, batch=2, length=8)


def build_model(size: Size) -> nn.Module:
    """A BERT classifier of MiniLM's shape with random weights; no dropout, so that all variants do the same work."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        intermediate_size=4 * size.hidden,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)  # type: ignore[no-any-return]


def make_batches(size: Size, count: int) -> Batches:
    """``count`` batches of tokens, shape (batch, length), and labels, shape (batch,)."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(size.vocabulary, (size.batch, size.length), generator=generator),
            torch.randint(CLASSES, (size.batch,), generator=generator),
        )
        for _ in range(count)
    ]


class Classifier(pl.LightningModule):
    """The model in plain Lightning."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.model = build_model(size)

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


def train_with_lightning(
    size: Size, batches: Batches, callbacks: Sequence[pl.Callback] = (), devices: int = 1, strategy: Any = "auto"
) -> list[float]:
    """Seconds of each step in a Trainer, from the beginning of one batch to that of the next."""
    times = StepTimes()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, times],
    )
    trainer.fit(Classifier(size), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return [after - before for before, after in pairwise(times.times)]


def as_published() -> HiFTCallback:
    """The paper's settings: the defaults would make fewer groups of such a model."""
    return HiFTCallback(group_size=1, order="bottom2up", steps_per_group=1, always_active=[], lr_scale=1.0)


def train_by_hand(size: Size, batches: Batches) -> list[float]:
    """Seconds of each step in a plain loop with one AdamW per group, written for this model alone."""
    model = build_model(size)
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


class Variant(NamedTuple):
    """A way to train.

    Args:
        what: For the reader.
        train: Takes the size of the model and the batches; returns seconds of each step.
    """

    what: str
    train: Callable[[Size, Batches], list[float]]


FULL, ONE_GROUP, BY_HAND, HIFT = "full", "one_group", "by_hand", "hift"
VARIANTS = {
    FULL: Variant("full fine-tuning, plain Lightning", train_with_lightning),
    ONE_GROUP: Variant(
        "one group, lightning_hift",
        lambda size, batches: train_with_lightning(size, batches, [HiFTCallback(group_size=100, always_active=[])]),
    ),
    BY_HAND: Variant("HiFT, loop by hand", train_by_hand),
    HIFT: Variant("HiFT, lightning_hift", lambda size, batches: train_with_lightning(size, batches, [as_published()])),
}


def run(configs: Sequence[str], options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds per step over whole sweeps: the mean, and by place in the sweep.

    Of the steps at each place the fastest counts: what else the machine did only ever adds to a time.

    Raises:
        ValueError: An option is unknown, or cannot be.
    """
    check_options(options, ("variant", "round", "sweeps", "tiny"))
    variant, sweeps = options.get("variant"), options.get("sweeps", 2)
    if variant not in VARIANTS:
        raise ValueError(f"Got variant={variant!r}; choose one of {', '.join(VARIANTS)}.")
    if not isinstance(sweeps, int) or sweeps < 1:
        raise ValueError(f"Got sweeps={sweeps!r}; it must be a whole number of at least 1.")
    size = TINY if options.get("tiny") else SIZE
    places = len(find_layer_units(build_model(size)))
    warm_up = WARM_UP_STEPS + places
    times = VARIANTS[variant].train(size, make_batches(size, warm_up + sweeps * places))
    measured = list(enumerate(times))[warm_up:]
    by_place = [min(seconds for step, seconds in measured if step % places == place) for place in range(places)]
    return {
        "seconds_per_step": mean(by_place),
        "seconds_by_place": by_place,
        "steps": len(measured),
        "threads": torch.get_num_threads(),
        "size": size._asdict(),
    }


# --- the report -------------------------------------------------------------------------------------------------------


def write_report(
    benchmark: Benchmark, cells: Sequence[Cell], by_device: Mapping[str, Mapping[str, Record]]
) -> list[Path]:
    """Milliseconds and speeds by variant, the targets, and all values in CSV."""
    return write_tables(benchmark, cells, by_device, "Seconds per step", _sections)


def _sections(cells: Sequence[Cell], records: Mapping[str, Record]) -> list[str]:
    times: dict[str, dict[Any, float]] = {name: {} for name in VARIANTS}
    told: dict[str, None] = {}
    for cell in cells:
        if (record := records.get(cell.key)) is not None and record["status"] == MEASURED:
            measured = record["measured"]
            times[cell.options["variant"]][cell.options.get("round")] = measured["seconds_per_step"]
            told[_setting(measured)] = None

    def ratio(above: str, below: str) -> float | None:
        """The median over rounds in which both were measured."""
        found = [seconds / times[below][i] for i, seconds in times[above].items() if i in times[below]]
        return median(found) if found else None

    rows = [
        [VARIANTS[name].what, f"{1000 * median(found.values()):.0f}", number_text(ratio(FULL, name), ".2f"), len(found)]
        for name, found in times.items()
        if found
    ]
    targets = [
        _speed_target("HiFT against full fine-tuning", ratio(FULL, HIFT), 1.70),
        _time_target("HiFT against the loop by hand", ratio(HIFT, BY_HAND), 0.03),
        _time_target("one group against plain Lightning", ratio(ONE_GROUP, FULL), 0.03),
    ]
    return [
        format_markdown(["variant", "ms per step", "speed against full", "rounds"], rows),
        "## Targets",
        format_markdown(["through lightning_hift", "target", "measured", "result"], targets),
        *(f"{setting}; medians of rounds, ratios within a round." for setting in told),
    ]


def _speed_target(what: str, value: float | None, least: float) -> list[str]:
    result = "not measured" if value is None else "met" if value >= least else "missed"
    return [f"speed: {what}", f"at least {least:.2f}", number_text(value, ".2f"), result]


def _time_target(what: str, value: float | None, most: float) -> list[str]:
    more = None if value is None else value - 1
    result = "not measured" if more is None else "met" if more <= most else "missed"
    return [
        f"time per step: {what}",
        f"at most {100 * most:+.0f} %",
        "-" if more is None else f"{100 * more:+.1f} %",
        result,
    ]


def _setting(measured: Mapping[str, Any]) -> str:
    size = Size(**measured["size"])
    places = len(measured["seconds_by_place"])
    return (
        f"BERT, {size.layers} layers, hidden {size.hidden}, vocabulary {size.vocabulary}, fp32, AdamW,"
        f" batch {size.batch} x {size.length}; {measured['threads']} threads; {measured['steps'] // places} sweeps of"
        f" {places} steps, the fastest step at each place, after {WARM_UP_STEPS} steps and one sweep of warm-up"
    )
