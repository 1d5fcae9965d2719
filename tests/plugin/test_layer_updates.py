"""LayerUpdates measures what the optimizer did, wherever state and masters are, and says what never moved."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_hift import HiFTStrategy, LayerUpdates
from lightning_hift.plugin.layer_updates_plot import plot_layer_updates
from tests.models import (
    GROUPS,
    Automatic,
    Manual,
    ResumableLoader,
    as_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
    weights,
)

UNITS = ["embedding", "net.blocks.0", "net.blocks.1", "net.blocks.2", "head"]


class Snapshots(Automatic):
    """Keeps a copy of all weights before training and after each batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.taken: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not self.taken:
            self.taken.append(weights(self))

    def on_train_batch_end(self, *rest: Any) -> None:
        self.taken.append(weights(self))

    def moved(self, step: int, unit: int) -> tuple[float, float]:
        """Norm of a unit's update in a step, and that of its weights before."""
        before, after = self.taken[step], self.taken[step + 1]
        update = math.hypot(*(float((after[name] - before[name]).double().norm()) for name in GROUPS[unit]))
        return update, math.hypot(*(float(before[name].double().norm()) for name in GROUPS[unit]))


def fit(module: pl.LightningModule, updates: LayerUpdates, steps: int = 10, **options: Any) -> LayerUpdates:
    callbacks = [updates, *options.pop("callbacks", [as_published()])]
    trainer(max_steps=steps, max_epochs=None, callbacks=callbacks, **options).fit(module, loader(steps))
    return updates


def recorded(tmp_path: Path, module: pl.LightningModule | None = None, **options: Any) -> list[dict[str, Any]]:
    """What a run of 10 steps writes."""
    return fit(module or Automatic(), LayerUpdates(tmp_path, plot=False), **options).rows


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        None,
        {},
        {"offload": "none", "prefetch": False},
        {"max_group_numel": 60},
    ],
    ids=["callback", "strategy", "no offload", "slices"],
)
def test_updates_are_those_of_the_weights(options: dict[str, Any] | None, tmp_path: Path) -> None:
    module = Snapshots()
    strategy: dict[str, Any] = {} if options is None else {"strategy": HiFTStrategy(**options)}
    rows = recorded(tmp_path, module, **strategy)
    assert [(row["sweep"], row["unit"], row["steps"]) for row in rows] == [
        (s, unit, 1) for s in (0, 1) for unit in UNITS
    ]
    for step, row in enumerate(rows):
        update, weight = module.moved(step, step % 5)
        assert row["update"] == pytest.approx(update, rel=1e-9)
        assert row["weight"] == pytest.approx(weight, rel=1e-9)
        assert row["relative"] == pytest.approx(update / weight, rel=1e-9)
        assert row["parameters"] == sum(module.taken[0][name].numel() for name in GROUPS[step % 5])


def test_measuring_changes_no_weight(tmp_path: Path) -> None:
    watched, alone = Automatic(), Automatic()
    fit(watched, LayerUpdates(tmp_path, plot=False))
    trainer(max_steps=10, max_epochs=None, callbacks=[as_published()]).fit(alone, loader(10))
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize("masters", ["full", "split"])
@pytest.mark.parametrize("max_group_numel", [None, 60])
def test_masters_are_compared_not_their_rounded_weights(
    masters: Any, max_group_numel: int | None, tmp_path: Path
) -> None:
    # An update far below what 16 bits resolve: plain SGD moves a master by exactly lr times the gradient.
    class Norms(Automatic):
        def __init__(self) -> None:
            super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=1e-4))
            self.norms: list[float] = []

        def on_train_batch_end(self, *rest: Any) -> None:
            self.norms.append(float(self.trainer.callback_metrics["hift/grad_norm"]))

    module = Norms()
    strategy = HiFTStrategy(master_weights=masters, max_group_numel=max_group_numel)
    rows = recorded(tmp_path, module, strategy=strategy, precision="bf16-true", steps=5)
    # The norms are taken of 16-bit gradients, and 32 bits resolve the updates to some parts in a thousand.
    assert [row["update"] for row in rows] == pytest.approx([1e-4 * norm for norm in module.norms], rel=5e-3)


def test_manual_optimization_and_always_active_units(tmp_path: Path) -> None:
    rows = recorded(tmp_path, Manual(), callbacks=[as_published(always_active=["head"], steps_per_group=2)], steps=16)
    steps = {(row["sweep"], row["unit"]): row["steps"] for row in rows}
    assert steps == {(s, unit): 8 if unit == "head" else 2 for s in (0, 1) for unit in UNITS}


def test_without_hift_each_step_is_a_sweep(tmp_path: Path) -> None:
    module = Snapshots()
    updates = fit(module, LayerUpdates(tmp_path, every_n_sweeps=3, plot=False), callbacks=[], steps=7)
    assert [(row["sweep"], row["unit"]) for row in updates.rows] == [(s, unit) for s in (0, 3, 6) for unit in UNITS]
    for row in updates.rows:
        update, weight = module.moved(row["sweep"], UNITS.index(row["unit"]))
        assert row["relative"] == pytest.approx(update / weight, rel=1e-9)


def test_only_every_nth_sweep_is_measured(tmp_path: Path) -> None:
    updates = fit(Automatic(), LayerUpdates(tmp_path, every_n_sweeps=2, plot=False), steps=20)
    assert sorted({row["sweep"] for row in updates.rows}) == [0, 2]


def test_several_optimizers(tmp_path: Path) -> None:
    class Two(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second = Automatic().net, Automatic().net

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for net, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):  # type: ignore[arg-type]
                loss = next_token_loss(net, batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.first, self.second)]

    updates = fit(Two(), LayerUpdates(tmp_path, plot=False), steps=10)
    assert len(updates.sizes) == 10
    assert {unit.split(":")[0] for unit in updates.sizes} == {"optimizer 0", "optimizer 1"}
    assert updates.never_moved == []


# --- what is written and said -----------------------------------------------------------------------------------------


def test_files_are_written_to_the_folder_of_the_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(tmp_path)
    fit(Automatic(), LayerUpdates(), logger=logger)
    folder = Path(logger.log_dir)
    rows = list(csv.DictReader((folder / "layer_updates.csv").open()))
    assert [row["unit"] for row in rows] == 2 * UNITS
    assert all(float(row["relative"]) > 0 for row in rows)
    assert (folder / "layer_updates.png").read_bytes().startswith(b"\x89PNG")
    assert "All 5 layer units moved" in caplog.text


class DeadBlock(Automatic):
    """Its second block gets a gradient of zero."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * sum(p.sum() for p in self.parameters())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.net.blocks[1].parameters():
            if p.grad is not None:
                p.grad.zero_()


def test_units_that_never_moved_are_named(tmp_path: Path) -> None:
    module = DeadBlock(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    message = r"2 of 5 layer units never moved: net.blocks.1, head \(no measured step reached it\)"
    with pytest.warns(UserWarning, match=message):
        updates = fit(module, LayerUpdates(tmp_path), steps=4)
    assert updates.never_moved == ["net.blocks.1", "head"]
    assert (tmp_path / "layer_updates.png").exists()


def test_a_run_that_fails_still_writes(tmp_path: Path) -> None:
    class Failing(Automatic):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 7:
                raise OSError("no more data")
            return super().training_step(batch, batch_idx)

    updates = LayerUpdates(tmp_path, plot=False)
    with pytest.raises(OSError, match="no more data"):
        fit(Failing(), updates)
    assert len(list(csv.DictReader((tmp_path / "layer_updates.csv").open()))) == 7


@pytest.mark.parametrize("hift", [True, False])
def test_a_resumed_run_goes_on_with_the_same_table(hift: bool, tmp_path: Path) -> None:
    def run(folder: str, steps: int, **options: Any) -> tuple[pl.Trainer, LayerUpdates]:
        updates = LayerUpdates(tmp_path / folder, plot=False)
        made = trainer(max_steps=steps, max_epochs=None, callbacks=[updates, *([as_published()] if hift else [])])
        made.fit(Automatic(), ResumableLoader(tokens(10)), **options)
        return made, updates

    _, whole = run("whole", 10)
    first, _ = run("first", 7)
    first.save_checkpoint(tmp_path / "last.ckpt")
    _, resumed = run("second", 10, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.rows == whole.rows


def test_a_callback_can_be_used_for_a_second_fit(tmp_path: Path) -> None:
    updates = LayerUpdates(tmp_path, plot=False)
    for _ in range(2):
        fit(Automatic(), updates, steps=5)
    assert [row["steps"] for row in updates.rows] == [1] * 5


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Got every_n_sweeps=0; it must be at least 1"):
        LayerUpdates(every_n_sweeps=0)
    with pytest.raises(ValueError, match="no step was measured"):
        plot_layer_updates([], ["head"], tmp_path / "out.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"lightning-hift\[plot\], or set plot=False"):
        fit(Automatic(), LayerUpdates(tmp_path))


@pytest.mark.parametrize(("num_units", "num_sweeps"), [(5, 1), (80, 40), (3, 1500)])
def test_pictures_of_any_size(num_units: int, num_sweeps: int, tmp_path: Path) -> None:
    units = [f"net.layers.{i}" for i in range(num_units)]
    rows = [
        {"sweep": sweep, "unit": unit, "relative": 0.0 if i == 1 else 1e-3 / (sweep + 1)}
        for sweep in range(num_sweeps)
        for i, unit in enumerate(units[:-1])
    ]
    plot_layer_updates(rows, units, tmp_path / "out.svg")
    drawn = (tmp_path / "out.svg").read_text()
    for text in ("layers.1: never moved", f"layers.{num_units - 1}: never moved", "no step", "did not move"):
        assert text in drawn
    assert "layers.0: never moved" not in drawn


def test_names_are_as_long_as_they_must_be() -> None:
    from lightning_hift.plugin.layer_updates_plot import _short

    assert _short(["embedding", "net.layers.0", "head"]) == ["embedding", "layers.0", "head"]
    assert _short(["a.encoder.layers.0", "a.decoder.layers.0"]) == ["encoder.layers.0", "decoder.layers.0"]


def test_works_with_a_module_of_one_layer(tmp_path: Path) -> None:
    class One(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch.float()).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    assert fit(One(), LayerUpdates(tmp_path), steps=2).never_moved == []
