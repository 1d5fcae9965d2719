"""The learning rate is constant in a sweep, and the schedule ends where it should."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from lightning_hift import SweepLR
from tests.models import (
    Automatic,
    Manual,
    Net,
    adamw,
    as_published,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
    weights,
)
from tests.reference.sweep_means import sweep_means

STEPS = 13  # two sweeps of five groups and a part of the third
END_WITH_THE_RUN = ("cosine", "one_cycle")


def warmup(optimizer):
    return schedulers.LambdaLR(optimizer, lambda step: min(1.0, step / 8))


SCHEDULES = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 - step / 40),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=STEPS),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "warmup": warmup,
}


def plain_lrs(make, steps=STEPS):
    optimizer = torch.optim.AdamW(Net().parameters(), lr=0.01)
    scheduler = make(optimizer)
    lrs = []
    for _ in range(steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs, scheduler, optimizer


@pytest.mark.parametrize("module", [Automatic, Manual])
@pytest.mark.parametrize("name", SCHEDULES)
def test_replay_holds_within_a_sweep_and_ends_where_plain_steps_end(name, module):
    lrs = []

    class Watch(module):
        def on_train_batch_start(self, batch, batch_idx):
            lrs.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    model = Watch(make_scheduler=SCHEDULES[name])
    run = trainer(callbacks=[as_published()])
    run.fit(model, loader(STEPS))
    _, scheduler, optimizer = plain_lrs(SCHEDULES[name])
    end = STEPS if name in END_WITH_THE_RUN else 15
    held = sweep_means(plain_lrs(SCHEDULES[name], end)[0].__getitem__, 5, end)
    assert lrs == [held(step) for step in range(STEPS)]
    config = run.lr_scheduler_configs[0]
    assert config.scheduler.last_epoch == scheduler.last_epoch == STEPS
    assert run.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert isinstance(config.scheduler, type(scheduler))


def test_once_takes_one_step_per_sweep_and_warns():
    model = Automatic(make_scheduler=SCHEDULES["exponential"])
    run = trainer(callbacks=[as_published(hold_lr="once")])
    with pytest.warns(UserWarning, match="ExponentialLR will get about 3 of the 13 steps"):
        run.fit(model, loader(STEPS))
    assert model.lrs == [0.01] * 5 + [0.01 * 0.9] * 5 + [0.01 * 0.9 * 0.9] * 3


def test_off_leaves_the_scheduler_alone():
    model = Automatic(make_scheduler=SCHEDULES["exponential"])
    run = trainer(callbacks=[as_published(hold_lr="off")])
    run.fit(model, loader(STEPS))
    assert model.lrs == plain_lrs(SCHEDULES["exponential"])[0]
    assert type(run.lr_scheduler_configs[0].scheduler) is schedulers.ExponentialLR


def test_epoch_schedule():
    # Epochs of 4 steps, sweeps of 5: the second and third one have steps of two epochs.
    model = Automatic(make_scheduler=lambda o: schedulers.ExponentialLR(o, 0.5), interval="epoch")
    run = trainer(callbacks=[as_published()], max_epochs=3)
    run.fit(model, loader(4))
    assert model.lrs == pytest.approx([0.009] * 5 + [0.004] * 5 + [0.0025] * 2)
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 3


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation(accumulate):
    model = Automatic(make_scheduler=SCHEDULES["lambda"])
    run = trainer(callbacks=[as_published()], accumulate_grad_batches=accumulate)
    run.fit(model, loader(8 * accumulate - 1))
    held = sweep_means(lambda step: 0.01 * (1 - step / 40), 5)
    assert model.lrs[::accumulate] == [held(step) for step in range(8)]
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 8


@pytest.mark.parametrize(("module", "steps"), [(Automatic, 13), (Manual, 13), (Automatic, 3)])
def test_warmup_from_zero_does_not_waste_the_first_sweep(module, steps):
    model = module(make_scheduler=warmup)
    before = weights(model)
    run = trainer(callbacks=[as_published()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "(?!Detected call of `lr_scheduler)")
        run.fit(model, loader(steps))
    moved = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert len(moved) == (len(before) if steps == 13 else 13)
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == steps


def test_no_schedule_is_stepped_past_its_total():
    # OneCycleLR raises when it is; this one starts at 0 and lasts for exactly the run.
    def one_cycle(optimizer):
        scheduler = schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
        optimizer.param_groups[0]["lr"] = 0.0
        return scheduler

    model = Automatic(make_scheduler=one_cycle)
    run = trainer(callbacks=[as_published()])
    run.fit(model, loader(4))
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 4


def test_in_a_plain_loop_the_scheduler_goes_on_while_its_learning_rate_is_held():
    model = Net()
    optimizer = adamw(model.parameters())
    engine = attach_published(model, optimizer)
    scheduler = SweepLR(schedulers.ExponentialLR(optimizer, 0.5), engine)
    lrs, last = [], []
    for batch in tokens(11):
        lrs.append(optimizer.param_groups[0]["lr"])
        next_token_loss(model, batch).backward()
        optimizer.step()
        scheduler.step()
        last.append(scheduler.get_last_lr()[0])
    held = sweep_means(lambda step: 0.01 * 0.5**step, 5)
    assert lrs == [held(step) for step in range(11)]
    assert last == [0.01 * 0.5 ** (step + 1) for step in range(11)]
    assert optimizer.param_groups[0]["lr"] == lrs[-1]
    scheduler.finish()
    assert optimizer.param_groups[0]["lr"] == last[-1]
    assert scheduler.last_epoch == 11


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("name", ["lambda", "exponential", "one_cycle", "sequential", "warmup"])
@pytest.mark.parametrize("cut", [3, 5, 8])
def test_state_round_trip(name, cut, finished):
    def start():
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        engine = attach_published(model, optimizer)
        return model, optimizer, SweepLR(SCHEDULES[name](optimizer), engine, total_steps=STEPS)

    def steps(model, optimizer, scheduler, batches):
        lrs = []
        for batch in batches:
            lrs.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
            next_token_loss(model, batch).backward()
            optimizer.step()
            scheduler.step()
        return lrs

    whole = steps(*start(), tokens(STEPS))
    model, optimizer, scheduler = start()
    steps(model, optimizer, scheduler, tokens(cut))
    if finished:
        scheduler.finish()
    saved = optimizer.state_dict(), scheduler.state_dict()
    other = start()
    other[1].load_state_dict(saved[0])
    other[2].load_state_dict(saved[1])
    assert steps(*other, tokens(STEPS)[cut:]) == whole[cut:]


def test_bare_scheduler_state_opens_and_held_state_opens_in_a_bare_scheduler():
    optimizer = adamw(Net().parameters())
    bare = schedulers.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    bare.step()
    model = Net()
    second = adamw(model.parameters())
    held = SweepLR(schedulers.ExponentialLR(second, 0.5), attach_published(model, second))
    held.load_state_dict(bare.state_dict())
    assert held.last_epoch == 1
    third = adamw(Net().parameters())
    fresh = schedulers.ExponentialLR(third, 0.5)
    fresh.load_state_dict(held.state_dict())
    assert fresh.last_epoch == 1


def test_unknown_mode():
    model = Net()
    optimizer = adamw(model.parameters())
    engine = attach_published(model, optimizer)
    with pytest.raises(ValueError, match="hold_lr='twice'; choose one of 'replay', 'once', 'off'"):
        SweepLR(schedulers.ExponentialLR(optimizer, 0.5), engine, "twice")
