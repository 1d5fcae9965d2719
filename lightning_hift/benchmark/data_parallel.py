"""The kind ``"data_parallel"``: bytes that processes exchange per step, and how the step's time grows with them.

A cell trains the model of the kind ``"speed"`` on the CPU, with as many rows for each process however many there are.
Its options are ``variant`` (see ``VARIANTS``), ``processes`` and ``round``; and, as one likes, ``sweeps`` and ``tiny``
as there. Each process has the threads of the cell. Bytes are those of gradients handed over to be summed up, and of
weights sent to others, by one process; what says which gradients there are is not counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lightning_hift.benchmark.cell_process import MEASURED
from lightning_hift.benchmark.kinds import check_options
from lightning_hift.benchmark.matrix import Benchmark, Cell
from lightning_hift.benchmark.records import Record
from lightning_hift.benchmark.report import number_text, size_text, write_tables
from lightning_hift.benchmark.speed import (
    SIZE,
    TINY,
    WARM_UP_STEPS,
    Size,
    as_published,
    build_model,
    make_batches,
    train_with_lightning,
)
from lightning_hift.distributed.ddp_strategy import HiFTDDPStrategy
from lightning_hift.groups.grouping import find_layer_units
from lightning_hift.table import format_markdown


class Variant(NamedTuple):
    """A way to train in several processes.

    Args:
        what: For the reader.
        make_strategy: Makes the Trainer's strategy.
        hift: Whether it trains one layer group at a time.
    """

    what: str
    make_strategy: Callable[[], Strategy]
    hift: bool = True


DDP, HIFT, PARTITIONED = "ddp", "hift", "hift_partitioned"
VARIANTS = {
    DDP: Variant("full fine-tuning, DDPStrategy", lambda: DDPStrategy(find_unused_parameters=True), hift=False),
    HIFT: Variant("HiFT, hift_ddp", lambda: HiFTDDPStrategy(check_every_n_steps=0)),
    PARTITIONED: Variant(
        "HiFT, hift_ddp, state divided", lambda: HiFTDDPStrategy(check_every_n_steps=0, partition_state=True)
    ),
}


class SentBytes(pl.Callback):
    """Bytes that this process hands over at each step."""

    def __init__(self) -> None:
        self.by_step: list[int] = []
        self._of_ddp = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            hook = lambda _, bucket: self._count(bucket)  # noqa: E731  # one with other annotations is refused
            trainer.strategy.model.register_comm_hook(None, hook)

    def on_train_batch_start(self, *args: Any) -> None:
        self._of_ddp = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.by_step.append(getattr(trainer.strategy, "sent_bytes", self._of_ddp))

    def _count(self, bucket: Any) -> Future[Tensor]:
        self._of_ddp += bucket.buffer().nbytes
        group: Any = dist.group.WORLD
        return allreduce_hook(group, bucket)


def run(configs: Sequence[str], options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds per step of the slowest process, as the kind ``"speed"`` takes them, and bytes per step of the first one.

    Raises:
        ValueError: An option is unknown, or cannot be.
    """
    check_options(options, ("variant", "processes", "round", "sweeps", "tiny"))
    variant, counts = options.get("variant"), {name: options.get(name, 2) for name in ("processes", "sweeps")}
    if variant not in VARIANTS:
        raise ValueError(f"Got variant={variant!r}; choose one of {', '.join(VARIANTS)}.")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"Got {name}={count!r}; it must be a whole number of at least 1.")
    size, (processes, sweeps) = TINY if options.get("tiny") else SIZE, counts.values()
    places = len(find_layer_units(build_model(size)))
    warm_up = WARM_UP_STEPS + places
    arguments = (
        processes,
        find_free_network_port(),
        torch.get_num_threads(),
        variant,
        size,
        warm_up + sweeps * places,
        folder,
    )
    torch.multiprocessing.spawn(_train, arguments, processes)  # type: ignore[no-untyped-call, attr-defined]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    steps = range(warm_up, warm_up + sweeps * places)
    slowest = [max(each["seconds"][step] for each in found) for step in steps]
    by_place = [min(s for step, s in zip(steps, slowest, strict=True) if step % places == i) for i in range(places)]
    return {
        "seconds_per_step": mean(by_place),
        "bytes_per_step": mean(found[0]["bytes"][step] for step in steps),
        "steps": len(steps),
        "groups": places,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "size": size._asdict(),
    }


def _train(
    rank: int, processes: int, port: int, threads: int, variant: str, size: Size, count: int, folder: Path
) -> None:
    """One process of a run: writes what it has measured to ``folder``."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    torch.set_num_threads(threads)
    sent = SentBytes()
    callbacks = [*([as_published()] if VARIANTS[variant].hift else []), sent]
    strategy = VARIANTS[variant].make_strategy()
    seconds = train_with_lightning(size, make_batches(size, count), callbacks, devices=processes, strategy=strategy)
    (folder / f"{rank}.json").write_text(json.dumps({"seconds": seconds, "bytes": sent.by_step}))


# --- the report -------------------------------------------------------------------------------------------------------


def write_report(
    benchmark: Benchmark, cells: Sequence[Cell], by_device: Mapping[str, Mapping[str, Record]]
) -> list[Path]:
    """Bytes, times and scaling by variant and number of processes, the target, and all values in CSV."""
    return write_tables(benchmark, cells, by_device, "Data parallel", _sections)


def _sections(cells: Sequence[Cell], records: Mapping[str, Record]) -> list[str]:
    found: dict[tuple[str, int], dict[Any, dict[str, Any]]] = {}  # by variant and processes, by round
    for cell in cells:
        if (record := records.get(cell.key)) is not None and record["status"] == MEASURED:
            place = cell.options["variant"], record["measured"]["processes"]
            found.setdefault(place, {})[cell.options.get("round")] = record["measured"]

    def ratio(value: str, above: tuple[str, int], below: tuple[str, int]) -> float | None:
        """The median over rounds in which both were measured."""
        both = found.get(above, {}).keys() & found.get(below, {}).keys()
        return median(found[above][i][value] / found[below][i][value] for i in both) if both else None

    rows = [
        [
            VARIANTS[name].what,
            processes,
            size_text(median(each["bytes_per_step"] for each in rounds.values())),
            number_text(ratio("bytes_per_step", (name, processes), (DDP, processes)), ".3f"),
            f"{1000 * median(each['seconds_per_step'] for each in rounds.values()):.0f}",
            number_text(ratio("seconds_per_step", (DDP, processes), (name, processes)), ".2f"),
            number_text(ratio("seconds_per_step", (name, 1), (name, processes)), ".2f"),
            len(rounds),
        ]
        for (name, processes), rounds in found.items()
    ]
    header = ["variant", "processes", "bytes per step", "of DDP's", "ms per step", "speed against DDP"]
    targets = [
        _bytes_target(processes, each["groups"], ratio("bytes_per_step", (HIFT, processes), (DDP, processes)))
        for (name, processes), rounds in found.items()
        if name == HIFT and processes > 1
        for each in list(rounds.values())[:1]
    ]
    settings = dict.fromkeys(_setting(each) for rounds in found.values() for each in rounds.values())
    return [
        format_markdown([*header, "scaling from 1 process", "rounds"], rows),
        "## Targets",
        format_markdown(["bytes per step", "target", "measured", "result"], targets),
        *(f"{setting}; medians of rounds, ratios within a round." for setting in settings),
    ]


def _bytes_target(processes: int, groups: int, value: float | None) -> list[str]:
    most = 1 / groups + 0.05
    result = "not measured" if value is None else "met" if value <= most else "missed"
    what = f"HiFT against DDP, {processes} processes, {groups} layer groups"
    return [what, f"at most {most:.3f}", number_text(value, ".3f"), result]


def _setting(measured: Mapping[str, Any]) -> str:
    size = Size(**measured["size"])
    return (
        f"BERT, {size.layers} layers, hidden {size.hidden}, vocabulary {size.vocabulary}, fp32, AdamW, batch"
        f" {size.batch} x {size.length} for each process; {measured['threads']} threads for each; gloo on one machine;"
        f" {measured['steps'] // measured['groups']} sweeps of {measured['groups']} steps, the fastest step at each"
        f" place, after {WARM_UP_STEPS} steps and one sweep of warm-up"
    )
