"""Trial steps touch nothing of the user's, and what cannot be tried is not foreseen."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections import deque
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from transformers import get_scheduler

from lightning_hift import SweepLR
from lightning_hift.engine.lr_forecast import LRForecast
from tests.models import Net, adamw, attach_published, next_token_loss, tokens
from tests.reference.sweep_means import sweep_means

STEPS = 12  # two sweeps of five groups and a part of the third
CALLS: list[int] = []
CONFIG = {"total": 40}
COUNT = 0


def new_optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)


class Custom(schedulers.LRScheduler):
    """Draws or counts with something of its own."""

    def __init__(self, optimizer, own, factor):
        self.own, self.factor_of = own, factor
        super().__init__(optimizer)

    def get_lr(self):
        return [base * self.factor_of(self.own) for base in self.base_lrs]


def rotated(own):
    own.rotate(1)
    return own[0]


def appended(own):
    own.append(len(own))
    return 1 / len(own)


class Factor:
    """A function with a memory."""

    def __init__(self):
        self.calls = 0
        self.seen = {"steps": []}

    def __call__(self, step):
        self.calls += 1
        self.seen["steps"].append(step)
        return 0.99**self.calls


class WithGradualWarmup(schedulers.LRScheduler):
    def __init__(self, optimizer, after):
        self.after = after
        super().__init__(optimizer)

    def get_lr(self):
        return self.after.get_last_lr() if self.last_epoch > 4 else [b * self.last_epoch / 4 for b in self.base_lrs]

    def step(self, epoch=None):
        if self.last_epoch > 4:
            self.after.step()
        super().step()


class NoScheduler:
    """torch's interface, and none of its classes."""

    def __init__(self, optimizer):
        self.optimizer, self.lrs = optimizer, iter([0.01 * 0.9**i for i in range(100)])

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] = next(self.lrs)

    def state_dict(self):
        return {}


FORESEEN = {
    "random": lambda o: Custom(o, random.Random(3), lambda own: own.uniform(0.5, 1.5)),
    "numpy_generator": lambda o: Custom(o, np.random.default_rng(3), lambda own: own.uniform(0.5, 1.5)),
    "torch_generator": lambda o: Custom(
        o, torch.Generator().manual_seed(3), lambda own: float(torch.rand((), generator=own))
    ),
    "deque": lambda o: Custom(o, deque([1.0, 0.5, 0.1]), rotated),
    "list": lambda o: Custom(o, [], appended),
    "iterator": lambda o: Custom(o, iter([1 / n for n in range(1, 99)]), next),
    "count": lambda o: Custom(o, itertools.count(1), lambda own: 1 / next(own)),
    "array": lambda o: Custom(o, np.ones(1), lambda own: float(np.multiply(own, 0.9, out=own)[0])),
    "tensor": lambda o: Custom(o, torch.ones(1), lambda own: own.mul_(0.9).item()),
    "callable": lambda o: schedulers.LambdaLR(o, Factor()),
    "bound_method": lambda o: schedulers.LambdaLR(o, Factor().__call__),
    "partial": lambda o: schedulers.LambdaLR(o, functools.partial(lambda factor, step: factor(step), Factor())),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LambdaLR(o, Factor()), schedulers.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, total_iters=7), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "warm_restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "cyclic": lambda o: schedulers.CyclicLR(o, 1e-3, 0.01, 4, cycle_momentum=False, scale_fn=lambda cycle: 1 / cycle),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=99),
    "wrapped": lambda o: WithGradualWarmup(o, schedulers.CosineAnnealingLR(o, 30)),
    "transformers": lambda o: get_scheduler("cosine", o, 3, 99),
    "no_scheduler": NoScheduler,
    "global_dict": lambda o: schedulers.LambdaLR(o, lambda step: 1 - step / CONFIG["total"]),
    "read_closure": lambda o: (lambda total: schedulers.LambdaLR(o, lambda step: 1 - step / total["of"]))({"of": 50}),
    "python_draws": lambda o: Custom(o, None, lambda own: random.uniform(0.5, 1.5)),
    "numpy_draws": lambda o: Custom(o, None, lambda own: np.random.uniform(0.5, 1.5)),
    "torch_draws": lambda o: Custom(o, None, lambda own: float(torch.rand(()))),
}


def counting_closure(optimizer):
    calls = 0

    def factor(step):
        nonlocal calls
        calls += 1
        return 0.99**calls

    return schedulers.LambdaLR(optimizer, factor)


def list_closure(optimizer):
    calls = []
    return schedulers.LambdaLR(optimizer, lambda step: 0.99 ** (calls.append(step) or len(calls)))


def dict_closure(optimizer):
    state = {"calls": 0}

    def factor(step):
        state["calls"] += 1
        return 0.99 ** state["calls"]

    return schedulers.LambdaLR(optimizer, factor)


def closure_of_a_function_that_counts(optimizer):
    counter = Factor()
    return schedulers.LambdaLR(optimizer, lambda step: counter(step))


def mutable_default(optimizer):
    return schedulers.LambdaLR(optimizer, lambda step, calls=[]: 0.99 ** (calls.append(step) or len(calls)))


def global_count(optimizer):
    def factor(step):
        global COUNT
        COUNT += 1
        return 0.99**COUNT

    return schedulers.LambdaLR(optimizer, factor)


def generator(optimizer):
    return Custom(optimizer, (0.9**i for i in itertools.count()), next)


def closure_over_an_iterator(optimizer):
    factors = iter([1 / n for n in range(1, 99)])
    return schedulers.LambdaLR(optimizer, lambda step: next(factors))


def class_that_counts(optimizer):
    class Counts(schedulers.LRScheduler):
        seen: ClassVar = []

        def get_lr(self):
            self.seen.append(self.last_epoch)
            return [base * 0.99 ** len(self.seen) for base in self.base_lrs]

    return Counts(optimizer)


def class_over_a_list(optimizer):
    seen = []

    class Counts(schedulers.LRScheduler):
        def get_lr(self):
            seen.append(self.last_epoch)
            return [base * 0.99 ** len(seen) for base in self.base_lrs]

    return Counts(optimizer)


class Anneals(schedulers.LRScheduler):
    """Writes to a module."""

    def __init__(self, optimizer):
        self.module = nn.Dropout(0.5)
        super().__init__(optimizer)

    def get_lr(self):
        self.module.p *= 0.9
        return [base * self.module.p for base in self.base_lrs]


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.total, self.seen = 0, 40, []

    def counts(self, step):
        self.calls += 1
        return 0.99**self.calls

    def sees(self, step):
        self.seen.append(step)
        return 0.99 ** len(self.seen)

    def reads(self, step):
        return self.rest_of(step) / self.total

    def rest_of(self, step):
        return self.total - step


FORESEEN["module_that_is_read"] = lambda o: schedulers.LambdaLR(o, Owner().reads)
FORESEEN["closure_over_a_module"] = lambda o: (
    lambda owner: schedulers.LambdaLR(o, lambda step: 1 - step / owner.total)
)(Owner())
UNFORESEEN = {
    "counting_closure": counting_closure,
    "list_closure": list_closure,
    "dict_closure": dict_closure,
    "closure_of_a_function_that_counts": closure_of_a_function_that_counts,
    "mutable_default": mutable_default,
    "global_list": lambda o: schedulers.LambdaLR(o, lambda step: 0.99 ** (CALLS.append(step) or len(CALLS))),
    "global_count": global_count,
    "generator": generator,
    "closure_over_an_iterator": closure_over_an_iterator,
    "class_that_counts": class_that_counts,
    "class_over_a_list": class_over_a_list,
    "writes_to_a_module": Anneals,
    "module_that_counts": lambda o: schedulers.LambdaLR(o, Owner().counts),
    "module_that_sees": lambda o: schedulers.LambdaLR(o, Owner().sees),
    "closure_over_a_module": lambda o: (lambda owner: schedulers.LambdaLR(o, lambda step: owner.counts(step)))(Owner()),
    "closure_over_random": lambda o: (lambda draws: schedulers.LambdaLR(o, lambda step: draws.uniform(0.5, 1.5)))(
        random.Random(3)
    ),
}
DRAWS = {"python_draws", "numpy_draws", "torch_draws"}  # other steps draw from the same numbers


def from_the_start():
    """Globals and random numbers as they were."""
    global COUNT
    CALLS.clear()
    COUNT = 0
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def plain_rates(make, steps=15):
    from_the_start()
    optimizer = new_optimizer()
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def held_rates(make, num_steps=STEPS):
    """What is in force at each step, and what the scheduler itself has set after it."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine = attach_published(model, optimizer)
    from_the_start()
    held = SweepLR(make(optimizer), engine)
    found, own = [], []
    for batch in tokens(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        next_token_loss(model, batch).backward()
        optimizer.step()
        held.step()
        own.append(optimizer.state_dict()["param_groups"][0]["lr"])
    return found, own, engine.rates


@pytest.mark.parametrize("name", FORESEEN)
def test_what_holds_its_own_state_is_foreseen_and_not_touched(name):
    plain = plain_rates(FORESEEN[name], 16)
    found, own, rates = held_rates(FORESEEN[name])
    assert own == plain[1 : STEPS + 1]
    assert not rates.unforeseen
    if name not in DRAWS:
        held = sweep_means(plain[:15].__getitem__, 5)
        assert found == [held(step) for step in range(STEPS)]
    assert len(set(found[:5])) == len(set(found[5:10])) == 1


@pytest.mark.parametrize("name", UNFORESEEN)
def test_what_reaches_more_than_it_reads_is_not_tried(name):
    plain = plain_rates(UNFORESEEN[name], 16)
    found, own, rates = held_rates(UNFORESEEN[name])
    assert own == plain[1 : STEPS + 1]
    assert found == [plain[0]] * 5 + [plain[5]] * 5 + [plain[10]] * 2
    assert len(rates.unforeseen) == 1


def test_random_numbers_go_on_as_if_nothing_were_tried():
    optimizer = new_optimizer()

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def all_three(own):
        return sum(draw())

    scheduler = Custom(optimizer, None, all_three)
    model = Net()
    engine = attach_published(model, adamw(model.parameters()))
    held = SweepLR(scheduler, engine)
    from_the_start()
    expected = draw()
    from_the_start()
    forecast = LRForecast([held._schedule], optimizer, engine.policy, 0)
    assert len({options[0]["lr"] for options in (forecast.of_sweep(0), forecast.of_sweep(5))}) == 2
    assert draw() == expected


@pytest.mark.parametrize("name", [n for n in UNFORESEEN if n not in ("generator", "writes_to_a_module")])
def test_a_first_sweep_that_would_begin_with_nothing_follows_the_scheduler(name):
    """What cannot be foreseen has no mean; held, a warm-up would waste the sweep."""
    make = UNFORESEEN[name]

    def warmed(optimizer):
        scheduler = make(optimizer)
        return schedulers.LambdaLR(optimizer, Warmed(scheduler))

    class Warmed:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, step):
            return step / 8

    plain = plain_rates(warmed)
    found, _, rates = held_rates(warmed)
    assert rates.unforeseen
    assert found == plain[:5] + [plain[5]] * 5 + [plain[10]] * 2


def test_aliases_of_param_groups_are_those_of_the_copy():
    class Direct:
        def __init__(self, optimizer):
            self.optimizer, self.groups, self.first = optimizer, optimizer.param_groups, optimizer.param_groups[0]

        def step(self):
            assert self.first is self.groups[0]
            self.first["lr"] *= 0.9

        def state_dict(self):
            return {}

    plain = plain_rates(Direct)
    held = sweep_means(plain.__getitem__, 5)
    assert held_rates(Direct)[0] == pytest.approx([held(step) for step in range(STEPS)], rel=1e-12)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_are_of_the_bare_scheduler(copied):
    model = Net()
    optimizer = adamw(model.parameters())
    held = SweepLR(schedulers.ExponentialLR(optimizer, 0.9), attach_published(model, optimizer))
    assert isinstance(held, schedulers.ExponentialLR)
    assert type(held) is SweepLR
    bare = copied(held)
    assert type(bare) is schedulers.ExponentialLR
    bare.last_epoch = 7
    assert held.last_epoch == 0
