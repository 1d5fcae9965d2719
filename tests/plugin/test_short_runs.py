"""Runs of any length: learning rates, and what is chosen by the length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as schedulers
from transformers import get_scheduler

from lightning_hift import HiFTCallback, LayerUnit, SweepLR, SweepSchedule, group_units
from lightning_hift.engine.lr_forecast import SPANS_RUN, RunLength
from lightning_hift.engine.sweep_rates import SweepRates
from lightning_hift.groups.turns import Turns, choose_turns
from lightning_hift.plugin.run_length import run_length
from tests.models import Automatic, Manual, as_published, loader, trainer
from tests.reference.sweep_means import sweep_means

LR = 0.01


def by_name(name):
    """A schedule as the tasks build it."""

    def make(optimizer, total):
        scheduler = get_scheduler(name, optimizer, min(math.ceil(0.06 * total), total - 1), total)
        setattr(scheduler, SPANS_RUN, True)
        return scheduler

    return make


SCHEDULES = {
    **{name: by_name(name) for name in ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")},
    "one_cycle": lambda o, total: schedulers.OneCycleLR(o, max_lr=LR, total_steps=total),
    "torch_cosine": lambda o, total: schedulers.CosineAnnealingLR(o, T_max=total),
    "torch_linear": lambda o, total: schedulers.LinearLR(o, 1.0, 0.0, total_iters=total),
}


@dataclass
class Position:
    """What a ``SweepLR`` sees of an engine."""

    optimizer: torch.optim.Optimizer
    policy: SweepSchedule
    step: int = 0

    def __post_init__(self):
        self.groups = range(self.policy.num_groups)
        self.rates = SweepRates(self.optimizer, self.policy, lambda: self.step)


def optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)


def plain_rates(make, total):
    bare = optimizer()
    scheduler = make(bare, total)
    rates = []
    for _ in range(total):
        rates.append(bare.param_groups[0]["lr"])
        bare.step()
        scheduler.step()
    return rates, bare.param_groups[0]["lr"]


def held_rates(make, total, num_groups, steps_per_group, hold_lr="replay"):
    bare = optimizer()
    engine = Position(bare, SweepSchedule(num_groups, steps_per_group=steps_per_group))
    held = SweepLR(make(bare, total), engine, hold_lr)
    held.expect(RunLength(total))
    rates = []
    for _ in range(total):
        rates.append(bare.param_groups[0]["lr"])
        bare.step()
        engine.step += 1
        held.step()
    held.finish()
    return rates, bare.param_groups[0]["lr"]


lengths = st.one_of(st.integers(1, 40), st.integers(1, 400))
sizes = {"total": lengths, "num_groups": st.integers(1, 40), "steps_per_group": st.integers(1, 6)}


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(SCHEDULES)), **sizes)
def test_a_sweep_has_the_mean_of_plain_training(name, total, num_groups, steps_per_group):
    plain, end = plain_rates(SCHEDULES[name], total)
    held_for = num_groups * steps_per_group if num_groups > 1 else 1  # one group is full fine-tuning
    expected = sweep_means(plain.__getitem__, held_for, total)
    found, found_end = held_rates(SCHEDULES[name], total, num_groups, steps_per_group)
    assert found == pytest.approx([expected(step) for step in range(total)], rel=1e-12, abs=1e-18)
    assert found_end == end
    assert math.fsum(found) == pytest.approx(math.fsum(plain), rel=1e-9)
    assert (max(found) > 0) == (max(plain) > 0)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(["constant_with_warmup", "linear", "cosine", "polynomial"]), **sizes)
def test_schedules_of_the_whole_run_are_the_same_in_both_ways_to_hold(name, total, num_groups, steps_per_group):
    way = SCHEDULES[name], total, num_groups, steps_per_group
    assert held_rates(*way, hold_lr="once") == held_rates(*way, hold_lr="replay")


@settings(max_examples=200, deadline=None)
@given(warmup=st.integers(0, 3), sweeps=st.integers(1, 12), num_groups=st.integers(1, 12), rest=st.integers(0, 11))
def test_once_goes_by_sweeps_and_never_begins_with_nothing(warmup, sweeps, num_groups, rest):
    def make(optimizer, total):
        """Sized in sweeps, as the paper's schedules are."""
        return get_scheduler("linear", optimizer, min(warmup, count - 1), count)

    total = (sweeps - 1) * num_groups + 1 + rest % num_groups
    count = sweeps
    by_sweep, _ = plain_rates(make, sweeps)
    found, _ = held_rates(make, total, num_groups, 1, "once")
    expected = [by_sweep[step // num_groups] for step in range(total)]
    if by_sweep[0] == 0 and sweeps > 1 and num_groups > 1:
        expected[:num_groups] = [by_sweep[1]] * num_groups
    assert found == expected
    assert found[0] > 0 or num_groups == 1


@pytest.mark.parametrize("hold_lr", ["replay", "once"])
@pytest.mark.parametrize("total", [1000 * 7, 999 * 7 + 3])
def test_a_thousand_sweeps(total, hold_lr):
    plain, end = plain_rates(SCHEDULES["cosine"], total)
    expected = sweep_means(plain.__getitem__, 7, total)
    found, found_end = held_rates(SCHEDULES["cosine"], total, 7, 1, hold_lr)
    assert found == [expected(step) for step in range(total)]
    assert found_end == end


@pytest.mark.parametrize("hold_lr", ["replay", "once", "off"])
def test_a_warm_up_within_the_only_sweep(hold_lr):
    """A schedule of one's own, sized in steps, in a run that is shorter than a sweep."""

    def make(optimizer, total):
        return schedulers.LambdaLR(optimizer, lambda step: min(1.0, step / 10))

    found, _ = held_rates(make, 20, 28, 1, hold_lr)
    plain, _ = plain_rates(make, 20)
    if hold_lr == "off":
        assert found == plain
    else:  # this schedule would go on, so the run is taken for the beginning of a longer one
        assert found == [math.fsum(plain_rates(make, 28)[0]) / 28] * 20


# --- in a Trainer -----------------------------------------------------------------------------------------------------


class Watched(schedulers.LambdaLR):
    """Decays with each call, and notes before which optimizer step it is called."""

    def __init__(self, optimizer):
        super().__init__(optimizer, lambda step: 0.99**step)
        self.calls = []
        self.at = None

    def step(self, *args, **kwargs):
        if getattr(self, "at", None) is not None:
            self.calls.append(self.at())
        super().step(*args, **kwargs)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize(("interval", "frequency"), [("step", 1), ("step", 2), ("step", 3), ("epoch", 1), ("epoch", 2)])
@pytest.mark.parametrize("module", [Automatic, Manual])
def test_calls_are_foreseen(module, interval, frequency, accumulate):
    """``run_length`` says when Lightning calls a scheduler: compared with a run of plain Lightning."""

    class Module(module):
        def configure_optimizers(self):
            configured = super().configure_optimizers()
            configured["lr_scheduler"]["frequency"] = frequency
            return configured

        def on_train_start(self):
            (config,) = self.trainer.lr_scheduler_configs
            config.scheduler.at = lambda: self.trainer.global_step
            foreseen.append(run_length(self.trainer, 1, config))

    foreseen = []
    own, its = (
        ({"accumulate_grad_batches": accumulate}, {})
        if module is Manual
        else ({}, {"accumulate_grad_batches": accumulate})
    )
    model = Module(make_scheduler=Watched, interval=interval, **own)
    run = trainer(max_epochs=3, **its)
    run.fit(model, loader(7))
    (length,) = foreseen
    assert length.total_steps == run.global_step
    calls = run.lr_scheduler_configs[0].scheduler.calls
    steps = range(run.global_step)
    assert [length.calls_by(step) for step in steps] == [sum(call <= step for call in calls) for step in steps]


@pytest.mark.parametrize("hold_lr", ["replay", "once"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("batches", [1, 2, 3, 7, 12])
def test_a_fit_of_any_length(batches, accumulate, hold_lr):
    total = math.ceil(batches / accumulate)
    model = Automatic(make_scheduler=lambda o: SCHEDULES["linear"](o, total))
    run = trainer(callbacks=[as_published(hold_lr=hold_lr)], accumulate_grad_batches=accumulate)
    run.fit(model, loader(batches))
    plain, end = plain_rates(SCHEDULES["linear"], total)
    expected = sweep_means(plain.__getitem__, 5, total)
    assert model.lrs[::accumulate] == [expected(step) for step in range(total)]
    assert run.optimizers[0].param_groups[0]["lr"] == end


def test_a_run_that_learns_nothing_is_refused_before_its_first_step():
    def make(optimizer):
        return schedulers.LambdaLR(optimizer, lambda step: step / 10_000)

    model = Automatic(make_scheduler=make)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"run of 13 optimizer steps LambdaLR never reaches 1 %.*shorter than the run"):
        trainer(callbacks=[as_published()]).fit(model, loader(13))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    trainer(callbacks=[as_published()], fast_dev_run=1).fit(model, loader(13))


@pytest.mark.parametrize("lr_scale", [1.0, 3.0])
def test_the_learning_rate_in_use_is_logged(lr_scale):
    class Watch(Automatic):
        def on_train_batch_end(self, *args):
            logged.append(float(self.trainer.callback_metrics["hift/lr"]))

    logged = []
    model = Watch(make_scheduler=lambda o: SCHEDULES["linear"](o, 13))
    trainer(callbacks=[as_published(lr_scale=lr_scale)]).fit(model, loader(13))
    # A callback's hooks come before the module's.
    assert logged == pytest.approx([lr * lr_scale for lr in model.lrs])


# --- what is chosen by the length -------------------------------------------------------------------------------------


def units_of(*sizes):
    return [LayerUnit(f"unit{i}", (), {f"p{i}": torch.nn.Parameter(torch.zeros(size))}) for i, size in enumerate(sizes)]


SMALL_LLAMA = units_of(80, *[10] * 30)  # as SmolLM2-135M: the embedding is as large as eight blocks
LARGE_LLAMA = units_of(6, *[10] * 32, 6)  # as Llama-2-7B: blocks are the largest


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    total=st.integers(1, 5000),
    group_size=st.sampled_from([None, None, "balanced", 1, 3]),
    steps_per_group=st.sampled_from([None, None, 1, 5]),
)
def test_each_layer_trains_several_times_where_the_run_allows(sizes, total, group_size, steps_per_group):
    units = units_of(*sizes)
    turns = choose_turns(units, total, group_size, steps_per_group)
    assert group_size in (None, turns.group_size)
    assert steps_per_group in (None, turns.steps_per_group)
    groups = group_units(units, turns.group_size)
    if group_size is None and len(units) > 1:
        assert len(groups) >= min(2, len(group_units(units, "balanced")))
    if (group_size, steps_per_group) != (None, None):
        return
    schedule = SweepSchedule(steps_per_group=turns.steps_per_group, per_unit=turns.per_unit).bound_to(groups)
    sweeps = total / schedule.steps_per_sweep
    assert sweeps >= min(3, total / 2)
    assert len(groups) == len(group_units(units, "balanced")) or total < 30 * len(group_units(units, "balanced"))
    assert (turns.steps_per_group == 1) or sweeps >= 8


def test_a_length_that_is_not_known():
    assert choose_turns(SMALL_LLAMA, math.inf) == Turns("balanced", 4, per_unit=True)


def test_a_group_is_enlarged_no_further_than_it_may_be():
    assert choose_turns(LARGE_LLAMA, 20, most_numel=10).group_size == "balanced"
    size = choose_turns(LARGE_LLAMA, 20, most_numel=35).group_size
    assert max(group.numel for group in group_units(LARGE_LLAMA, size)) <= 35


@pytest.mark.parametrize("strategy", ["auto", "hift"])
def test_a_trainer_chooses_by_the_length_of_its_run(strategy, caplog):
    def fit(batches, **options):
        callback = HiFTCallback(**options)
        trainer(strategy=strategy, callbacks=[callback]).fit(Automatic(), loader(batches))
        return callback

    short = fit(12)
    assert (short.steps_per_group, short.policy.per_unit) == (1, False)
    assert "12 steps over 5 layers" in caplog.text
    long = fit(200)
    assert (long.steps_per_group, long.policy.per_unit) == (4, True)
    with pytest.warns(
        UserWarning, match=r"comes by each layer group 1\.3 times with group_size=1 and steps_per_group=2"
    ):
        given = fit(13, steps_per_group=2, group_size=1)
    assert (given.steps_per_group, given.group_size) == (2, 1)


def test_a_resumed_run_keeps_what_was_chosen(tmp_path):
    def fit(max_steps, ckpt_path=None):
        callback = HiFTCallback()
        run = trainer(callbacks=[callback], max_epochs=-1, max_steps=max_steps)
        run.fit(Automatic(), loader(12), ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / f"{max_steps}.ckpt")
        return callback

    first = fit(12)
    second = fit(400, tmp_path / "12.ckpt")
    assert second.turns == first.turns
    assert fit(400).turns != first.turns
    old = torch.load(tmp_path / "12.ckpt", weights_only=True)
    for state in old["callbacks"].values():
        state.pop("turns", None)
    torch.save(old, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="another grouping or policy"):  # it was not written by the old defaults
        fit(400, tmp_path / "old.ckpt")
