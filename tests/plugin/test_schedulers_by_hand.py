"""Schedulers that are stepped by hand or not at all, finders in mid-run, copies and pickles of what a run holds."""

from __future__ import annotations

import copy
import io
import pickle
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch.optim import lr_scheduler as schedulers

from lightning_hift import SweepLR
from tests.models import Automatic, Net, adamw, as_published, loader, next_token_loss, trainer
from tests.plugin.test_one_group import assert_same


class ByHand(pl.LightningModule):
    """Manual optimization as one writes it; ``when`` says after which batches the scheduler is stepped."""

    def __init__(self, make_scheduler, when, interval="step"):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.make_scheduler, self.when, self.interval = Net(), make_scheduler, when, interval
        self.lrs = []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        self.manual_backward(next_token_loss(self.net, batch))
        optimizer.step()
        if self.when(batch_idx):
            self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = adamw(self.parameters())
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": self.interval}]


class WithoutStep:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def halve(self):
        for group in self.optimizer.param_groups:
            group["lr"] /= 2

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def lrs_of(way, *args):
    model = ByHand(*args)
    trainer(**way, max_epochs=3).fit(model, loader(6))
    return model.lrs


WHEN = {
    "never": lambda index: False,
    "each_step": lambda index: True,
    "each_epoch": lambda index: index == 5,
    "now_and_then": lambda index: index in (1, 2),
}


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("way", [{}, {"strategy": "hift"}], ids=["callback", "strategy"])
def test_a_sweep_has_the_learning_rate_of_its_start(when, interval, way):
    """Nobody knows beforehand when a scheduler is stepped by hand."""
    args = (lambda o: schedulers.ExponentialLR(o, 0.9), WHEN[when], interval)
    plain = lrs_of({}, *args)
    assert lrs_of({**way, "callbacks": [as_published()]}, *args) == [plain[step - step % 5] for step in range(18)]


@pytest.mark.filterwarnings("ignore:HiFT. after the first sweep")  # the first step is one with 0
def test_a_warm_up_by_hand_does_not_waste_the_first_sweep():
    args = (lambda o: schedulers.LambdaLR(o, lambda step: min(1.0, step / 8)), WHEN["each_step"])
    plain = lrs_of({}, *args)
    found = lrs_of({"callbacks": [as_published()]}, *args)
    assert found == plain[:5] + [plain[step - step % 5] for step in range(5, 18)]


@pytest.mark.parametrize("way", [{}, {"strategy": "hift"}], ids=["callback", "strategy"])
def test_a_scheduler_without_step(way):
    class Module(ByHand):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            if batch_idx == 3:
                self.lr_schedulers().halve()

    model = Module(WithoutStep, WHEN["never"])
    trainer(**way, callbacks=[as_published()]).fit(model, loader(6))
    assert model.lrs == [0.01] * 4 + [0.005] * 2


class AtEpochs(LearningRateFinder):
    """Lightning's documentation has it: searches again at some epochs."""

    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, run, module):
        if run.current_epoch == 1:
            self.lr_find(run, module)


class WithRate(Automatic):
    lr = 0.01

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [{"scheduler": schedulers.ExponentialLR(optimizer, 0.99), "interval": "step"}]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_finder_in_mid_run(tmp_path):
    def fit(**options):
        finder = AtEpochs(num_training_steps=8)
        callbacks = [as_published(), finder]
        model = WithRate()
        trainer(**options, callbacks=callbacks, max_epochs=3, default_root_dir=tmp_path).fit(model, loader(9))
        return model.lrs

    lrs = fit(strategy="hift")
    assert len(lrs) > 27
    with pytest.raises(
        RuntimeError, match=r"LearningRateFinder, which takes all other callbacks out .* strategy='hift'"
    ):
        fit()


WAYS = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy}


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS["torch.save"] = saved


class Copies(pl.Callback):
    """Copies what a run holds, itself included, once: after a batch, or at the end of fit."""

    found: ClassVar[list] = []

    def __init__(self, way, when):
        self.way, self.when = way, when

    def copy(self, run):
        held = run.lr_scheduler_configs[0].scheduler, run.optimizers[0], run.strategy.lr_scheduler_configs[0], run
        Copies.found.append([WAYS[self.way](value) for value in held])

    def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
        if self.when == "in_mid_sweep" and batch_idx == 6:
            self.copy(run)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["in_mid_sweep", "after"])
@pytest.mark.parametrize("strategy", ["auto", "hift"])
def test_copies_and_pickles_are_as_without_hift(way, when, strategy):
    def fit(*hift, **options):
        copies = Copies(way, when)
        run = trainer(callbacks=[*hift, copies], **options)
        run.fit(Automatic(make_scheduler=one_step_less), loader(8))
        if when == "after":
            copies.copy(run)

    Copies.found.clear()
    fit()
    fit(as_published(), strategy=strategy)
    plain, found = Copies.found
    assert type(found[0]) is type(found[2].scheduler) is schedulers.StepLR
    assert_same(found[0].state_dict(), plain[0].state_dict())
    assert_same(options_of(found[0].optimizer), options_of(plain[0].optimizer))
    assert_same(options_of(found[1]), options_of(plain[1]))
    assert found[1].state_dict()["state"].keys() >= set(range(14))
    found[0].optimizer.step()
    found[0].step()
    assert found[0].last_epoch == plain[0].last_epoch + 1
    (config,) = found[3].lr_scheduler_configs
    assert type(config.scheduler) is schedulers.StepLR
    assert config.scheduler.optimizer is found[3].optimizers[0]
    assert_same(options_of(found[3].optimizers[0]), options_of(plain[1]))


def one_step_less(optimizer):
    return schedulers.StepLR(optimizer, 1, gamma=0.9)


def options_of(optimizer):
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def test_a_held_scheduler_passes_for_what_it_is():
    run = trainer(callbacks=[as_published()])
    run.fit(Automatic(make_scheduler=one_step_less), loader(3))
    scheduler = run.lr_scheduler_configs[0].scheduler
    assert isinstance(scheduler, schedulers.StepLR)
    assert scheduler.__class__ is schedulers.StepLR
    assert type(scheduler) is SweepLR
