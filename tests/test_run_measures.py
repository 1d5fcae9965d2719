"""What a benchmark measures of a fit: memory by kind and group, updates, time; and that it changes nothing."""

import json

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_hift.benchmark import RunMeasures
from lightning_hift.benchmark.run_meter import RunMeter, Seconds
from tests.models import as_published

STEPS = 9


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layers(batch["x"]), batch["y"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(4, 8, generator=generator),
            "y": torch.randint(2, (4,), generator=generator),
            "input_ids": torch.ones(4, 5, dtype=torch.long),
        }
        for _ in range(count)
    ]


def fit(callbacks, steps=STEPS):
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(model, DataLoader(batches(steps // 3), batch_size=None), DataLoader(batches(1), batch_size=None))
    return model


def measured(tmp_path, *callbacks):
    path = tmp_path / "measures.json"
    model = fit([*callbacks, RunMeasures(str(path))])
    return model, json.loads(path.read_text())


def test_full_fine_tuning_has_gradients_and_state_of_everything(tmp_path):
    model, found = measured(tmp_path)
    nbytes = sum(p.nbytes for p in model.parameters())
    numel = nbytes // 4
    steps_taken = 4 * len(list(model.parameters()))  # AdamW counts them in one float each
    assert found["memory"]["parameters"] == found["memory"]["gradients"] == nbytes
    assert found["memory"]["state"] == found["state_on_device"] == 2 * nbytes + steps_taken
    assert found["memory"]["residual"] > 0
    assert found["memory"]["total"] == sum(found["memory"][k] for k in ("parameters", "gradients", "state", "residual"))
    assert list(found["memory_by_group"]) == ["all"]
    assert (found["parameters"], found["trained_parameters"], found["trainable_at_once"]) == (numel, numel, numel)
    assert found["updates_per_parameter"] == STEPS
    assert (found["step"], found["epochs"], found["tokens"]) == (STEPS, 3.0, STEPS * 20)
    assert found["learning_rate"] == 0.01


def test_hift_has_those_of_one_group(tmp_path):
    model, found = measured(tmp_path, as_published())
    sizes = {name: sum(p.nbytes for p in layer.parameters()) for name, layer in model.layers.named_children()}
    by_group = found["memory_by_group"]
    assert [by_group[name]["gradients"] for name in by_group] == list(sizes.values())
    assert found["memory"]["gradients"] == max(sizes.values())
    assert found["trainable_at_once"] == max(sizes.values()) // 4
    assert found["updates_per_parameter"] == STEPS / 3
    assert found["state_on_device"] == 2 * max(sizes.values()) + 8  # of one group, with the steps of its two tensors
    assert found["state_on_host"] == 2 * sum(sizes.values()) + 6 * 4
    assert all(parts["residual"] > 0 for parts in by_group.values())


def test_the_curve_has_a_point_for_each_validation(tmp_path):
    _, found = measured(tmp_path)
    assert [(point["step"], point["tokens"]) for point in found["curve"]] == [(3, 60), (6, 120), (9, 180)]
    seconds = [point["seconds"] for point in found["curve"]]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2] == found["seconds"]
    assert found["curve"][-1]["val_loss"] == found["val_loss"]
    assert [step for step, *_ in found["losses"]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("hift", [False, True])
def test_measuring_changes_no_weight(tmp_path, hift):
    callbacks = [as_published(order="top2down")] if hift else []
    model, _ = measured(tmp_path, *callbacks)
    other = fit([as_published(order="top2down")] if hift else [])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_memory_is_looked_at_on_demand_only(tmp_path):
    path = tmp_path / "measures.json"
    fit([RunMeasures(str(path), memory=False)])
    found = json.loads(path.read_text())
    assert "memory" not in found
    assert found["state_on_device"] > 0


def test_batches_without_a_clock_count_as_much_as_the_others():
    meter = RunMeter()
    meter._timed, meter._step_seconds, meter._untimed_batches = Seconds(6.0, 3.0), [1.0] * 4, 2
    assert meter.elapsed == Seconds(9.0, 4.5)
    assert meter.batches == 6
