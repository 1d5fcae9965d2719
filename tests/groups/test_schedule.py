from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_hift import HiFTEngine, SweepSchedule
from tests.models import attach_published


def sequence(schedule, steps):
    return [schedule.group_at(step) for step in range(steps)]


def test_fixed_orders():
    assert sequence(SweepSchedule(3), 7) == [0, 1, 2, 0, 1, 2, 0]
    assert sequence(SweepSchedule(3, "top2down"), 7) == [2, 1, 0, 2, 1, 0, 2]


def test_steps_per_group_stays_on_a_group():
    schedule = SweepSchedule(2, steps_per_group=3)
    assert sequence(schedule, 8) == [0, 0, 0, 1, 1, 1, 0, 0]
    assert schedule.steps_per_sweep == 6
    assert [schedule.sweep_at(s) for s in (0, 5, 6)] == [0, 0, 1]
    assert [s for s in range(13) if schedule.starts_sweep(s)] == [0, 6, 12]


def test_random_order_is_one_shuffle_repeated():
    schedule = SweepSchedule(8, "random", seed=3)
    first, second = sequence(schedule, 8), sequence(schedule, 16)[8:]
    assert first == second
    assert first != list(range(8))
    assert first != sequence(SweepSchedule(8, "random", seed=4), 8)


def test_reshuffle_draws_anew_each_sweep():
    steps = sequence(SweepSchedule(8, "random", reshuffle=True, seed=3), 24)
    sweeps = {tuple(steps[i : i + 8]) for i in (0, 8, 16)}
    assert len(sweeps) == 3


@given(
    groups=st.integers(1, 12),
    order=st.sampled_from(["bottom2up", "top2down", "random"]),
    per_group=st.integers(1, 4),
    seed=st.integers(0, 1000),
    sweep=st.integers(0, 50),
    reshuffle=st.booleans(),
)
def test_each_sweep_visits_each_group_equally_often(groups, order, per_group, seed, sweep, reshuffle):
    schedule = SweepSchedule(groups, order, reshuffle and order == "random", per_group, seed)
    start = sweep * schedule.steps_per_sweep
    visits = [schedule.group_at(step) for step in range(start, start + schedule.steps_per_sweep)]
    assert sorted(visits) == sorted(list(range(groups)) * per_group)
    assert visits == [schedule.group_at(step) for step in range(start, start + schedule.steps_per_sweep)]


@given(
    turns=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    order=st.sampled_from(["bottom2up", "top2down", "random"]),
    per_group=st.integers(1, 3),
    sweep=st.integers(0, 20),
)
def test_turns_are_as_long_as_they_should_be_and_in_the_same_order(turns, order, per_group, sweep):
    schedule = SweepSchedule(len(turns), order, order == "random", per_group, seed=5, turns=tuple(turns))
    assert schedule.steps_per_sweep == per_group * sum(turns)
    start = sweep * schedule.steps_per_sweep
    visits = [schedule.group_at(step) for step in range(start, start + schedule.steps_per_sweep)]
    stretches = [(group, len(list(steps))) for group, steps in groupby(visits)]
    assert stretches == [(group, per_group * turns[group]) for group, _ in stretches]
    even = SweepSchedule(len(turns), order, order == "random", seed=5)
    assert [group for group, _ in stretches] == sequence(even, (sweep + 1) * len(turns))[-len(turns) :]


def test_each_unit_of_balanced_groups_trains_as_often_as_in_groups_of_one():
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    model = nn.ModuleDict({"embedding": nn.Embedding(32, 4), "blocks": blocks, "head": nn.Linear(4, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = attach_published(model, optimizer, group_size="balanced", steps_per_group=2)
    assert [len(group.units) for group in engine.groups] == [1, 6, 1]
    assert engine.policy.steps_per_sweep == 2 * 8
    trained = [engine.policy.groups_at(step)[0] for step in range(16)]
    assert [trained.count(group) for group in range(3)] == [2, 12, 2]
    engine.close()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    HiFTEngine(other, engine.groups, SweepSchedule(3, steps_per_group=2))
    with pytest.raises(ValueError, match="turns"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": 0}, "num_groups=0"),
        ({"num_groups": 2, "steps_per_group": 0}, "steps_per_group=0"),
        ({"num_groups": 2, "order": "sideways"}, "'bottom2up', 'top2down', 'random'"),
        ({"num_groups": 2, "order": "down2up"}, "'bottom2up'"),
        ({"num_groups": 2, "order": "up2down"}, "'top2down'"),
        ({"num_groups": 2, "reshuffle": True}, "order='random'"),
        ({"num_groups": 2, "turns": (1,)}, r"turns=\(1,\)"),
        ({"num_groups": 2, "turns": (1, 0)}, r"turns=\(1, 0\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SweepSchedule(**arguments)


def test_negative_step():
    with pytest.raises(ValueError, match="step=-1"):
        SweepSchedule(2).group_at(-1)
