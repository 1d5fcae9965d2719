"""The offloader on its own, and proof that the lagging device notices each missing wait."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hift import HFT, LISA, BAdam, StateOffloader
from tests.lagging import LaggingDevice
from tests.models import Net, adamw, attach_published, next_token_loss, tokens


def parameter(value=0.0):
    return nn.Parameter(torch.full((3,), value))


def lagging(ignores=lambda waiting, awaited: False, eager=(), **options):
    return StateOffloader("cpu", device_module=LaggingDevice(ignores, eager), always_copy=True, **options)


def give_and_leave(offloader, p, state, group=None):
    """A step whose group then leaves the device."""
    group = group or offloader.add([p])
    offloader.take([group])
    offloader.give(group, {p: state})
    offloader.hold(None)
    return group


def test_lagging_device_poisons_until_the_event_is_waited_for():
    device = LaggingDevice()
    stream = device.Stream("cpu")
    source, destination = torch.ones(2), torch.zeros(2)
    ready = device.current_stream("cpu").record_event()
    with device.stream(stream):
        stream.wait_event(ready)
        destination.copy_(source)
        event = stream.record_event()
    assert destination.isnan().all()
    source.fill_(5.0)
    device.current_stream("cpu").wait_event(event)
    assert destination.tolist() == [5.0, 5.0]
    assert device.copies == 1


@pytest.mark.parametrize("make", [lambda: StateOffloader("cpu"), lagging], ids=["host", "lagging"])
def test_state_survives_a_round_trip(make):
    offloader, a, b = make(), parameter(), parameter()
    state = {"step": torch.tensor(3.0), "moments": [torch.ones(3), {"x": torch.arange(3)}], "name": "a"}
    group = give_and_leave(offloader, a, state)
    give_and_leave(offloader, b, {"m": torch.zeros(3)})
    taken = offloader.take([group])[a]
    assert taken["step"] == 3
    assert taken["moments"][0].tolist() == [1, 1, 1]
    assert taken["moments"][1]["x"].tolist() == [0, 1, 2]
    assert taken["name"] == "a"


def test_tensors_of_objects_move_with_the_rest():
    """GaLore keeps its projections so, and makes a new one in place of the old one."""
    offloader, a, b = lagging(), parameter(), parameter()
    projector = SimpleNamespace(rank=2, matrix=torch.ones(3), history=[torch.zeros(2)], cls=nn.Linear)
    group = give_and_leave(offloader, a, {"projector": projector})
    assert offloader.host_bytes == 12 + 8
    give_and_leave(offloader, b, {"m": torch.zeros(3)})
    taken = offloader.take([group])[a]["projector"]
    assert taken.matrix.tolist() == [1, 1, 1]
    assert (taken.rank, taken.cls, taken.history[0].tolist()) == (2, nn.Linear, [0, 0])
    taken.matrix = torch.full((4,), 5.0)
    give_and_leave(offloader, a, {"projector": taken}, group)
    offloader.drain()
    assert offloader.state_of(a)["projector"].matrix.tolist() == [5, 5, 5, 5]


def make_slot(offloader):
    """Let a first group come and go; its slot stays for the next ones."""
    p = parameter()
    group = give_and_leave(offloader, p, {"m": torch.ones(3)})
    offloader.take([group])
    offloader.hold(None)


def test_hold_prefetches_what_comes_next():
    device = LaggingDevice()
    offloader = StateOffloader("cpu", device_module=device, always_copy=True)
    make_slot(offloader)
    p = parameter()
    group = give_and_leave(offloader, p, {"m": torch.ones(3)})
    offloader.drain()
    released = device.copies
    offloader.hold(group)
    assert device.copies == released + 1
    assert offloader.take([group])[p]["m"].tolist() == [1, 1, 1]
    assert device.copies == released + 1


def test_a_group_of_many_tensors_moves_in_one_copy_for_each_dtype():
    device = LaggingDevice()
    offloader = StateOffloader("cpu", device_module=device, always_copy=True)
    owners = [parameter() for _ in range(9)]
    group = offloader.add(owners)
    states = {p: {"m": torch.ones(3), "v": torch.ones(5), "q": torch.ones(4, dtype=torch.uint8)} for p in owners}
    states[owners[0]]["hift_remainder"] = torch.ones(3, dtype=torch.int16)
    offloader.put(states)
    for _ in range(2):
        before = device.copies
        offloader.hold(group)
        taken = offloader.take([group])
        assert device.copies == before + 3
        for each in taken.values():
            each["v"] += 1  # in place
        offloader.give(group, taken)
        offloader.hold(None)
        assert device.copies == before + 6
    offloader.drain()
    assert all(offloader.state_of(p)["v"].tolist() == [3] * 5 for p in owners)


def test_what_is_new_or_has_another_shape_is_kept():
    offloader, p, q = lagging(), parameter(), parameter()
    group = offloader.add([p, q])

    def step(change):
        offloader.hold(group)
        states = offloader.take([group])
        change(states)
        offloader.give(group, states)
        offloader.hold(None)
        offloader.drain()

    step(lambda s: s.update({p: {"m": torch.ones(3), "hift_master": torch.zeros(3)}}))
    master = offloader.state_of(p)["hift_master"].data_ptr()
    step(lambda s: s.update({q: {"m": torch.full((2, 2), 2.0)}}))
    step(lambda s: s[p].update(m=torch.full((4,), 3.0), later=torch.arange(2), count=1))
    step(lambda s: s[p].update(count=s[p]["count"] + 1))
    step(lambda s: setattr(s[p]["m"], "data", torch.full((6,), 4.0)))
    step(lambda s: s[q].pop("m"))
    found = offloader.state_of(p)
    assert found["m"].tolist() == [4] * 6
    assert found["later"].tolist() == [0, 1]
    assert found["count"] == 2
    assert found["hift_master"].data_ptr() == master  # the places of others stay
    assert offloader.state_of(q) == {}
    assert offloader.host_bytes == 24 + 16 + 12


def test_a_larger_slot_is_made_only_when_what_lies_outside_has_left():
    offloader, small, large = lagging(), parameter(), nn.Parameter(torch.zeros(99))
    make_slot(offloader)
    groups = {p: offloader.add([p]) for p in (small, large)}
    offloader.put({small: {"m": torch.ones(3)}, large: {"m": torch.ones(99)}})
    for _ in range(3):
        for group in groups.values():
            offloader.hold(group)
            assert offloader.device_bytes <= 448  # 99 times 4, rounded up to 64
            offloader.give(group, offloader.take([group]))
            assert offloader.device_bytes <= 448
    assert offloader.device_bytes == 448


def test_a_small_group_after_a_large_one_does_not_wait_until_all_of_that_is_saved(monkeypatch):
    monkeypatch.setattr("lightning_hift.offload.transfers._CHUNK", 64)
    waits = []
    device = LaggingDevice(lambda waiting, awaited: waits.append((waiting, awaited)))
    offloader = StateOffloader("cpu", device_module=device, always_copy=True)
    small, large = parameter(), nn.Parameter(torch.zeros(99))
    groups = {p: offloader.add([p]) for p in (small, large)}
    offloader.put({small: {"m": torch.ones(3)}, large: {"m": torch.ones(99)}})
    offloader.hold(groups[large])
    offloader.give(groups[large], offloader.take([groups[large]]))
    copies, waits[:] = device.copies, []
    offloader.hold(groups[small])
    assert device.copies == copies + 7 + 1
    assert waits.count(("load", "save")) == 1
    offloader.take([groups[small]])
    assert device.copies_done - copies <= 3  # the first chunk was saved, and the small group loaded there
    offloader.drain()
    assert offloader.state_of(large)["m"].tolist() == [1] * 99


def test_without_prefetch_the_copy_waits_for_the_step():
    device = LaggingDevice()
    offloader = StateOffloader("cpu", prefetch=False, device_module=device, always_copy=True)
    p = parameter()
    group = give_and_leave(offloader, p, {"m": torch.ones(3)})
    released = device.copies
    offloader.hold(group)
    assert device.copies == released
    offloader.take([group])
    assert device.copies == released + 1


def test_a_prefetch_for_another_group_is_dropped_unharmed():
    offloader, a, b = lagging(), parameter(), parameter()
    of_a = give_and_leave(offloader, a, {"m": torch.ones(3)})
    of_b = give_and_leave(offloader, b, {"m": torch.zeros(3)})
    offloader.hold(of_a)
    offloader.hold(of_b)
    assert offloader.take([of_b])[b]["m"].tolist() == [0, 0, 0]
    assert offloader.take([of_a])[a]["m"].tolist() == [1, 1, 1]


def test_host_memory_is_allocated_once():
    offloader, p = lagging(), parameter()
    group = give_and_leave(offloader, p, {"m": torch.ones(3)})
    first = offloader.state_of(p)["m"].data_ptr()
    give_and_leave(offloader, p, offloader.take([group])[p], group)
    offloader.drain()
    assert offloader.state_of(p)["m"].data_ptr() == first


def test_offload_none_keeps_state_on_the_device():
    device = LaggingDevice()
    offloader, p = StateOffloader("cpu", "none", device_module=device, always_copy=True), parameter()
    give_and_leave(offloader, p, {"m": torch.ones(3)})
    assert device.copies == 0
    assert offloader.device_bytes == 12
    assert offloader.host_bytes == 0
    offloader.release_all()
    assert offloader.device_bytes == 0
    assert offloader.state_of(p)["m"].tolist() == [1, 1, 1]


def test_bytes():
    offloader, a, b = lagging(), parameter(), parameter()
    give_and_leave(offloader, a, {"m": torch.ones(3), "v": torch.ones(3)})
    offloader.give(offloader.add([b]), {b: {"m": torch.ones(3)}})
    # What is being released still is on the device.
    assert (offloader.device_bytes, offloader.host_bytes) == (12 + 24, 24)
    offloader.drain()
    assert (offloader.device_bytes, offloader.host_bytes) == (12, 24)


def test_put_copies_and_keeps_named_tensors_on_the_host():
    device = LaggingDevice()
    offloader, p = StateOffloader("cpu", device_module=device, always_copy=True), parameter()
    given, group = torch.ones(3), offloader.add([p])
    offloader.put({p: {"step": torch.tensor(1.0), "m": given}}, {p: ("step",)})
    given.zero_()
    taken = offloader.take([group])[p]
    assert device.copies == 1
    assert taken["m"].tolist() == [1, 1, 1]


def test_put_leaves_other_owners_alone():
    offloader, p, q = lagging(), parameter(), parameter()
    group = offloader.add([p, q])
    offloader.put({p: {"step": torch.tensor(1.0), "m": torch.ones(3)}}, {p: ("step",)})
    offloader.hold(group)
    states = offloader.take([group])
    states[p]["m"] += 1
    offloader.give(group, states)
    offloader.put({q: {"m": torch.zeros(2)}})
    assert offloader.state_of(p)["m"].tolist() == [2, 2, 2]
    assert offloader.state_of(q)["m"].tolist() == [0, 0]
    assert offloader.state_of(p)["step"] == 1
    offloader.put({p: {}})
    assert offloader.state_of(p) == {}
    assert offloader.state_of(q)["m"].tolist() == [0, 0]


@pytest.mark.parametrize("copies", [False, True])
def test_resident_state_is_replaced_by_state_of_another_form(copies):
    device = LaggingDevice()
    offloader = StateOffloader("cpu", "none", device_module=device, always_copy=copies)
    p = parameter()
    group = offloader.add([p])
    for form in ({"m": torch.ones(3)}, {"m": torch.ones(3), "v": torch.zeros(5)}, {"v": torch.ones(2)}, {}):
        offloader.put({p: form})
        offloader.hold(group)
        taken = offloader.take([group])
        assert {key: value.tolist() for key, value in taken.get(p, {}).items()} == {
            k: v.tolist() for k, v in form.items()
        }
        offloader.give(group, taken)
    assert offloader.state_of(p) == {}


AHEAD = {
    "one_step_each": {},
    "two_steps_each": {"steps_per_group": 2},
    "slices": {"max_group_numel": 100},
    "random": {"order": "random", "reshuffle": True},
    "BAdam": {"policy": BAdam(2)},
    "LISA": {"policy": LISA(1, 2)},
    "HFT": {"policy": HFT(2)},
    "masters": {"weights_dtype": torch.bfloat16},
    "masters_only": {"policy": LISA(1, 2, "reset"), "weights_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", AHEAD)
def test_what_is_stepped_first_is_fetched_ahead(name):
    model = Net()
    engine = attach_published(model, adamw(model.parameters()), make_offloader=lagging, **AHEAD[name])
    late = []
    for step, batch in enumerate(tokens(40)):
        next_token_loss(model, batch).backward()
        state = engine._stepper.turns_of(engine.active_groups)[0].state
        if state.flats and not (state.is_resident or state.arriving is not None):
            late.append(step)
        engine.optimizer.step()
    # The slot is made, and made larger, when all that is on the device has left.
    assert len(late) <= 3
    assert all(step < 20 for step in late)


def test_unknown_tier():
    with pytest.raises(ValueError, match="offload='cloud'; choose one of 'host', 'disk', 'none'"):
        StateOffloader("cpu", "cloud")


def steps_on(offloader, steps=7, repeats=1):
    """Weights and final state after a few steps; ``repeats`` steps the same batch's group several times."""
    model = Net()
    engine = attach_published(model, adamw(model.parameters()), make_offloader=lambda: offloader, advance_on_step=False)
    for batch in tokens(steps):
        engine.activate()
        for _ in range(repeats):
            next_token_loss(model, batch).backward()
            engine.announce_step()
            engine.optimizer.step()
    state = engine.optimizer.state_dict()["state"]
    return [p.detach().clone() for p in model.parameters()] + [s["exp_avg"] for s in state.values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("eager", [(), ("load",), ("save",), ("load", "save")], ids=str)
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("repeats", [1, 2])
def test_all_waits_in_place(repeats, prefetch, eager):
    copied = steps_on(lagging(eager=eager, prefetch=prefetch), 12, repeats)
    assert same(steps_on(StateOffloader("cpu"), 12, repeats), copied)


@pytest.fixture
def marked_memory():
    """New memory is NaN or the largest integer, not what happened to be there, which some optimizers refuse."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("marked_memory")
def test_missing_wait_of_the_step_for_the_fetch_is_noticed():
    forgetful = lagging(lambda waiting, awaited: (waiting, awaited) == ("compute", "load"))
    assert not same(steps_on(StateOffloader("cpu")), steps_on(forgetful))


LOADS_WITHOUT_WAITING_FOR_SAVES = lambda waiting, awaited: (waiting, awaited) == ("load", "save")  # noqa: E731


def test_missing_wait_before_writing_where_a_chunk_is_still_to_be_saved_is_noticed():
    assert not same(steps_on(StateOffloader("cpu")), steps_on(lagging(LOADS_WITHOUT_WAITING_FOR_SAVES)))


def test_missing_wait_before_loading_what_is_still_being_saved_is_noticed():
    def there_and_back(offloader):
        make_slot(offloader)
        p = parameter()
        group = give_and_leave(offloader, p, {"m": torch.ones(3)})
        offloader.hold(group)
        return offloader.take([group])[p]["m"].tolist()

    assert there_and_back(lagging()) == [1, 1, 1]
    assert there_and_back(lagging(eager=["load"])) == [1, 1, 1]
    assert there_and_back(lagging(LOADS_WITHOUT_WAITING_FOR_SAVES, eager=["load"])) != [1, 1, 1]


@pytest.mark.parametrize("side", ["load", "save"])
def test_missing_wait_of_a_copy_for_the_compute_stream_is_noticed(side):
    with pytest.raises(AssertionError, match=f"The {side} stream copies without having waited"):
        steps_on(lagging(lambda waiting, awaited: (waiting, awaited) == (side, "compute")))


def test_missing_wait_before_freeing_is_noticed():
    with pytest.raises(AssertionError, match="Memory was freed while the save stream"):
        steps_on(lagging(lambda waiting, awaited: (waiting, awaited) == ("compute", "save")))


def test_missing_drain_before_a_checkpoint_is_noticed(monkeypatch):
    monkeypatch.setattr(StateOffloader, "drain", lambda self: None)
    assert not same(steps_on(StateOffloader("cpu")), steps_on(lagging()))


# --- nobody waits -----------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes each value that is read from a tensor, for which a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"weights_dtype": torch.bfloat16}, {"max_group_numel": 100}], ids=str)
def test_the_host_waits_for_nothing_in_a_step(options):
    device = LaggingDevice()
    model = Net()
    engine = attach_published(
        model,
        torch.optim.AdamW(model.parameters(), fused=True),
        make_offloader=lambda: StateOffloader("cpu", device_module=device, always_copy=True),
        always_active=["head"],
        **options,
    )
    for batch in tokens(12):
        next_token_loss(model, batch).backward()
        with Watch() as watch:
            engine.optimizer.step()
            engine.offloader.exposed_ms()
        assert watch.reads == 0
    assert device.host_waits == 0
    assert device.copies > 0
    assert engine.first_sweep_report().complete  # the proof waits, once


def test_watch_notices_a_read():
    with Watch() as watch:
        float(torch.ones(()) + 1)
    assert watch.reads == 1


def test_phases_have_names_in_a_profile():
    with torch.profiler.profile() as profile:
        steps_on(lagging(), 12)
    names = {event.key for event in profile.key_averages()}
    assert {"HiFT::fetch", "HiFT::release", "HiFT::wait_for_state", "HiFT::show", "HiFT::hide"} <= names


def test_exposed_milliseconds():
    """The double takes a millisecond for each copy and makes none before somebody waits for it."""
    offloader, p = lagging(), parameter()
    assert offloader.exposed_ms() == 0
    make_slot(offloader)
    group = offloader.add([p])
    offloader.drain()
    offloader.end_step(ends_sweep=True)
    before = offloader.exposed_ms()
    offloader.put({p: {"m": torch.ones(3)}})
    offloader.hold(group)
    offloader.take([group])
    offloader.take([group])
    offloader.end_step()
    assert offloader.exposed_ms() == 1
    offloader.take([group])
    offloader.end_step(ends_sweep=True)
    assert offloader.exposed_ms() == 0
    assert before == 2  # a save from outside the slot, and a load
    assert (offloader.exposure.sweep_ms, offloader.exposure.sweep_max_ms) == (1, 1)
