"""What the user changes in a checkpoint counts, as in plain Lightning, whatever is held for the rest of a sweep.

The oracle is plain Lightning, which opens the same changed checkpoint: from there on, each sweep has the mean of its
learning rates.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import lr_scheduler as schedulers

from tests.matrices import crossed
from tests.models import Automatic, ResumableLoader, as_published, assert_same_weights, tokens, trainer
from tests.plugin.test_resume import assert_same_run

SWEEP, CUT, STEPS = 5, 8, 20
OPTIONS = ("lr", "betas", "weight_decay", "eps", "momentum")


class Watched(Automatic):
    """Notes what is in force in each parameter group at each step."""

    changed: Any = None

    def __init__(self, make_scheduler, **options):
        super().__init__(make_scheduler=make_scheduler, **{"make_optimizer": two_groups, **options})
        self.options: list[Any] = []

    def training_step(self, batch, batch_idx):
        groups = self.trainer.optimizers[0].param_groups
        self.options.append([{key: group[key] for key in OPTIONS if key in group} for group in groups])
        return super().training_step(batch, batch_idx)

    def on_load_checkpoint(self, checkpoint):
        if self.changed is not None:
            self.changed(checkpoint)


def two_groups(parameters):
    parameters = list(parameters)
    return torch.optim.AdamW([{"params": parameters[:4]}, {"params": parameters[4:], "lr": 0.003}], lr=0.01)


def one_cycle(optimizer):
    return schedulers.OneCycleLR(optimizer, max_lr=[0.01, 0.02], total_steps=STEPS + 1)


SCHEDULES = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 0.97**step),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=30),
    "one_cycle": one_cycle,
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=9), schedulers.ExponentialLR(o, 0.9)], milestones=[9]
    ),
}


def in_group(index, **values):
    def change(checkpoint):
        checkpoint["optimizer_states"][0]["param_groups"][index].update(values)

    change.only = {(index, name) for name in values}
    return change


def in_scheduler(**values):
    def change(checkpoint):
        for name, value in values.items():
            old = checkpoint["lr_schedulers"][0][name]
            if isinstance(old, list):
                old[:] = value  # in place
            else:
                checkpoint["lr_schedulers"][0][name] = value

    return change


def emptied(checkpoint):
    checkpoint["lr_schedulers"] = []


def everywhere(checkpoint):
    in_group(0, lr=0.2, initial_lr=0.2)(checkpoint)
    in_scheduler(base_lrs=[0.2, 0.003])(checkpoint)


CHANGES = {
    "lr-lambda": ("lambda", in_group(0, lr=0.5)),
    "lr-exponential": ("exponential", in_group(1, lr=0.5)),
    "lr-sequential": ("sequential", in_group(0, lr=0.5)),
    "betas-one_cycle": ("one_cycle", in_group(0, betas=(0.7, 0.9))),
    "betas-lambda": ("lambda", in_group(1, betas=(0.7, 0.9))),
    "others": ("cosine", in_group(1, weight_decay=0.3, eps=1e-4)),
    "base_lrs": ("lambda", in_scheduler(base_lrs=[0.2, 0.1])),
    "gamma": ("exponential", in_scheduler(gamma=0.5)),
    "T_max": ("cosine", in_scheduler(T_max=12)),
    "last_epoch": ("lambda", in_scheduler(last_epoch=1)),
    "both": ("lambda", everywhere),
    "emptied": ("lambda", emptied),
    "emptied-sequential": ("sequential", emptied),
}


def fit(make, steps, hift, path=None, changed=None, folder=None, cut=CUT, **options):
    model = Watched(make, **options)
    model.changed = changed
    callbacks = [as_published(**hift)] if hift is not None else []
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, "cut", every_n_train_steps=cut))
    run = trainer(max_epochs=-1, max_steps=steps, callbacks=callbacks, enable_checkpointing=folder is not None)
    run.fit(model, ResumableLoader(tokens(40)), ckpt_path=path, weights_only=False if path else None)
    return run


def mean_of(several):
    def mean(values):
        if isinstance(values[0], tuple):
            return tuple(mean(column) for column in zip(*values, strict=True))
        return values[0] if len(set(values)) == 1 else math.fsum(values) / len(values)

    return [{key: mean([each[key] for each in group]) for key in group[0]} for group in zip(*several, strict=True)]


def by_sweep(plain, start):
    """The mean of the options of plain training from ``start`` to the end of each sweep."""
    ends = [step - step % SWEEP + SWEEP for step in range(start, start + len(plain))]
    return [mean_of([options for options, e in zip(plain, ends, strict=True) if e == end]) for end in ends]


def assert_close(found, expected):
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for first, second in zip(a, b, strict=True):
            assert first == {key: pytest.approx(value, rel=1e-12) for key, value in second.items()}, step


@pytest.mark.parametrize(("change", "where"), crossed(CHANGES, ["file", "hook"]))
def test_a_change_counts_from_there_on(change, where, tmp_path, caplog):
    name, changed = CHANGES[change]
    make = SCHEDULES[name]
    whole = fit(make, STEPS, {}).lightning_module.options
    fit(make, CUT, {}, folder=tmp_path)
    path = tmp_path / "cut.ckpt"
    if where == "file":
        checkpoint = torch.load(path, weights_only=True)
        changed(checkpoint)
        torch.save(checkpoint, path)
        changed = None
    expected = by_sweep(fit(make, STEPS, None, path, changed).lightning_module.options, CUT)
    if only := getattr(CHANGES[change][1], "only", set()):
        for step in range(CUT, 2 * SWEEP):  # all else goes on as it was held
            for index, group in enumerate(whole[step]):
                expected[step - CUT][index] |= {k: v for k, v in group.items() if (index, k) not in only}
    with caplog.at_level("INFO"):
        found = fit(make, STEPS, {}, path, changed)
    assert_close(found.lightning_module.options, expected)
    assert found.lr_scheduler_configs[0].scheduler.last_epoch == STEPS - (CUT if "emptied" in change else 0) - (
        CUT - 1 if change == "last_epoch" else 0
    )
    held = change != "others"  # the rest is nobody's but the user's
    assert caplog.text.count("not as the checkpoint was written") == held


@pytest.mark.parametrize(("name", "cut", "hold_lr"), crossed(SCHEDULES, [8, 10], ["replay", "once"]))
@pytest.mark.filterwarnings("ignore:hold_lr='once' takes one scheduler step per sweep")
def test_what_was_not_changed_goes_on_as_it_was(name, hold_lr, cut, tmp_path, caplog):
    hift = {"hold_lr": hold_lr}
    whole = fit(SCHEDULES[name], STEPS, hift)
    fit(SCHEDULES[name], cut, hift, folder=tmp_path, cut=cut)
    with caplog.at_level("INFO"):
        found = fit(SCHEDULES[name], STEPS, hift, tmp_path / "cut.ckpt")
    assert found.lightning_module.options == whole.lightning_module.options[cut:]
    assert_same_run(whole, found)
    assert "not as the checkpoint was written" not in caplog.text


@pytest.mark.filterwarnings("ignore:hold_lr='once' takes one scheduler step per sweep")
def test_changes_with_one_step_per_sweep(tmp_path):
    hift = {"hold_lr": "once"}
    fit(SCHEDULES["exponential"], CUT, hift, folder=tmp_path)

    def lrs(changed):
        options = fit(SCHEDULES["exponential"], STEPS, hift, tmp_path / "cut.ckpt", changed).lightning_module.options
        return [groups[1]["lr"] for groups in options]

    # The step of the sweep under way was made before the change; the sweep after the next is the first to make another.
    assert lrs(in_group(1, lr=0.5)) == pytest.approx([0.5] * 2 + [0.5] * 5 + [0.5 * 0.9] * 5)
    assert lrs(in_scheduler(gamma=0.5)) == pytest.approx(
        [0.003 * 0.9] * 2 + [0.003 * 0.9**2] * 5 + [0.003 * 0.9**2 * 0.5] * 5
    )
    assert lrs(emptied) == pytest.approx([0.003 * 0.9] * 2 + [0.003 * 0.9**2] * 5 + [0.003 * 0.9**3] * 5)


@pytest.mark.parametrize("other", ["exponential", "cosine", "one_cycle"])
def test_another_scheduler_than_the_saved_one(other, tmp_path):
    """Plain Lightning gives it what state there is."""
    fit(SCHEDULES["exponential"], CUT, {}, folder=tmp_path)
    make = {**SCHEDULES, "exponential": lambda o: schedulers.ExponentialLR(o, 0.1)}[other]
    try:
        plain = fit(make, STEPS, None, tmp_path / "cut.ckpt").lightning_module.options
    except Exception as error:
        with pytest.raises(type(error)):
            fit(make, STEPS, {}, tmp_path / "cut.ckpt")
        return
    expected = by_sweep(plain, CUT)
    if other == "exponential":  # its own arguments are overwritten by the state, so that nothing has changed
        expected[:2] = fit(SCHEDULES[other], 2 * SWEEP, {}).lightning_module.options[CUT:]
    found = fit(make, STEPS, {}, tmp_path / "cut.ckpt")
    assert_close(found.lightning_module.options, expected)


def test_counters_of_an_optimizer(tmp_path):
    """What ``step`` itself counts in ``param_groups``, of each layer group apart, can be set, too."""

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
            seen.append(self.param_groups[0]["count"])
            return loss

    def make(parameters):
        return Counting(parameters, lr=0.01)

    seen = []
    fit(None, CUT, {}, folder=tmp_path, make_optimizer=make)
    assert seen == [1, 1, 1, 1, 1, 2, 2, 2]
    seen.clear()
    fit(None, STEPS, {}, tmp_path / "cut.ckpt", make_optimizer=make)
    assert seen == [2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4]
    seen.clear()
    fit(None, STEPS, {}, tmp_path / "cut.ckpt", in_group(0, count=70), make_optimizer=make)
    assert seen == [71, 71, 71, 71, 71, 72, 72, 72, 72, 72, 73, 73]


# --- schedulers that take the place of others -------------------------------------------------------------------------


class Swaps(Callback):
    """Puts another scheduler in the place of the first one at an epoch, and keeps its state itself."""

    def __init__(self, epoch):
        self.epoch, self.scheduler, self.loaded = epoch, None, None

    def on_fit_start(self, run, module):
        if self.loaded is not None:
            run.lr_scheduler_configs.clear()

    def on_train_epoch_start(self, run, module):
        if self.scheduler is None and run.current_epoch >= self.epoch:
            for group in run.optimizers[0].param_groups:
                group["initial_lr"] = 0.02
            self.scheduler = schedulers.PolynomialLR(run.optimizers[0], total_iters=40)
            if self.loaded is not None:
                self.scheduler.load_state_dict(self.loaded)
            run.lr_scheduler_configs[:] = [LRSchedulerConfig(self.scheduler, interval="step")]

    def state_dict(self):
        return {"scheduler": self.scheduler and self.scheduler.state_dict()}

    def load_state_dict(self, state):
        self.loaded = state["scheduler"]


SWAPS = {
    "averaging": lambda: StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=3),
    "linearly": lambda: StochasticWeightAveraging(0.02, 2, 3, annealing_strategy="linear"),
    "another": lambda: Swaps(2),
}


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("swap", "name", "interval", "first"),
    crossed(SWAPS, ["lambda", "exponential", "cosine"], ["epoch", "step"], ["hift", "swap"]),
)
def test_resumed_after_another_scheduler_took_over(swap, name, interval, first, tmp_path):
    def start(folder, path=None):
        model = Automatic(make_scheduler=SCHEDULES[name], interval=interval)
        callbacks = [as_published(), SWAPS[swap]()]
        callbacks = callbacks if first == "hift" else callbacks[::-1]
        callbacks.append(ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1))
        run = trainer(max_epochs=5, callbacks=callbacks, enable_checkpointing=True)
        run.fit(model, ResumableLoader(tokens(4)), ckpt_path=path, weights_only=False if path else None)
        return run

    whole = start(tmp_path / "whole")
    (path,) = (tmp_path / "whole").glob("*step=12.ckpt")  # sweeps of 5, epochs of 4
    resumed = start(tmp_path / "resumed", path)
    assert type(resumed.lr_scheduler_configs[0].scheduler) is type(whole.lr_scheduler_configs[0].scheduler)
    assert resumed.lightning_module.lrs == whole.lightning_module.lrs[12:]
    assert len(set(resumed.lightning_module.lrs[3:])) == 1
    assert resumed.lr_scheduler_configs[0].scheduler.state_dict().keys() >= {"last_epoch", "base_lrs"}
    assert_same_weights(resumed.lightning_module, whole.lightning_module)
