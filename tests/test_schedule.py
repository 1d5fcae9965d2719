import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hift import SweepSchedule


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": 0}, "num_groups=0"),
        ({"num_groups": 2, "steps_per_group": 0}, "steps_per_group=0"),
        ({"num_groups": 2, "order": "sideways"}, "'bottom2up', 'top2down', 'random'"),
        ({"num_groups": 2, "order": "down2up"}, "'bottom2up'"),
        ({"num_groups": 2, "order": "up2down"}, "'top2down'"),
        ({"num_groups": 2, "reshuffle": True}, "order='random'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SweepSchedule(**arguments)


def test_negative_step():
    with pytest.raises(ValueError, match="step=-1"):
        SweepSchedule(2).group_at(-1)
