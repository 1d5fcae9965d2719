"""What a benchmark measures of a fit: memory by kind and group, updates, time; and that it changes nothing."""

import json
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_hift import HiFTCallback, SelectionPolicy
from lightning_hift.benchmark import RunMeasures
from lightning_hift.benchmark.run_meter import RunMeter, Seconds, state_bytes_on_device
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


def fit(callbacks, steps=STEPS, **options):
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **{"max_epochs": 3, **options},
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
    assert [point["step"] for point in found["losses"]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("max_steps", [2, 4, 5, 6])
@pytest.mark.parametrize("hift", [False, True])
def test_metrics_are_those_of_the_last_step(hift, max_steps, tmp_path):
    callbacks = [RunMeasures(tmp_path / "it"), *([as_published()] if hift else [])]
    model = fit(callbacks, max_epochs=-1, max_steps=max_steps)  # epochs have 3 steps
    found = json.loads((tmp_path / "it").read_text())
    (batch,) = batches(1)
    assert found["step"] == max_steps
    assert found["val_loss"] == pytest.approx(float(model.training_step(batch, 0)), rel=1e-6)
    assert [point["step"] for point in found["curve"]] == sorted({*range(3, max_steps, 3), max_steps})


@pytest.mark.parametrize("window", [2, 3])
def test_accumulation_does_not_hide_gradients(window, tmp_path):
    fit([RunMeasures(tmp_path / "1")])
    fit([RunMeasures(tmp_path / "2")], accumulate_grad_batches=window)
    one, several = (json.loads((tmp_path / name).read_text())["memory"] for name in "12")
    assert several["gradients"] == one["gradients"] > 0
    # A gradient is there twice while it is added to those of the micro-batches before.
    assert one["residual"] <= several["residual"] <= one["residual"] + one["gradients"]


@pytest.mark.parametrize("window", [1, 2])
def test_hift_may_stand_before_or_after(window, tmp_path):
    def by_group(*callbacks):
        fit([*callbacks], accumulate_grad_batches=window, max_epochs=6)
        found = json.loads((tmp_path / "it").read_text())["memory_by_group"]
        return {name: parts["gradients"] for name, parts in found.items()}

    before = by_group(RunMeasures(tmp_path / "it"), as_published())
    assert before == by_group(as_published(), RunMeasures(tmp_path / "it"))
    assert len(set(before.values())) == len(before) == 3


def test_a_policy_may_name_groups_in_a_list(tmp_path):
    class InTurn(SelectionPolicy):
        steps_per_sweep = 3

        def groups_at(self, step):
            return [step % len(self.groups)]

    fit([RunMeasures(tmp_path / "it"), HiFTCallback(policy=InTurn())])
    assert len(json.loads((tmp_path / "it").read_text())["memory_by_group"]) == 3


def test_state_in_objects_and_in_quantized_tensors_is_counted():
    optim = pytest.importorskip("torchao.optim")
    weight = nn.Parameter(torch.randn(256, 256))
    optimizer = optim.AdamW8bit([weight])
    weight.grad = torch.randn(256, 256)
    optimizer.step()

    class Projection:
        def __init__(self):
            self.matrix = torch.zeros(7)

    optimizer.state[weight]["projector"] = Projection()
    trainer = SimpleNamespace(optimizers=[optimizer], callbacks=[])
    codes, scales = 256 * 256, 4 * 256 * 256 // 256
    assert 2 * (codes + scales) + 28 < state_bytes_on_device(trainer) < 2 * (codes + scales) + 28 + 5000


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
    meter._timed, meter._timed_batches, meter._untimed_batches = Seconds(6.0, 3.0), 4, 2
    assert meter.seconds(meter.reading) == Seconds(9.0, 4.5)
    assert meter.batches == 6


def test_time_never_goes_back_when_later_batches_are_faster():
    meter = RunMeter()
    meter._timed, meter._timed_batches, meter._untimed_batches = Seconds(8.0, 8.0), 1, 9
    early = meter.reading
    meter._timed, meter._timed_batches = Seconds(9.0, 9.0), 9
    assert meter.seconds(early) == Seconds(17.0, 17.0)
    assert meter.seconds(meter.reading) == Seconds(18.0, 18.0)
