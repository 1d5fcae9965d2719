"""The offloader on its own, and proof that the lagging device notices each missing wait."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hift import HiFTEngine, StateOffloader
from tests.lagging import LaggingDevice
from tests.models import Net, adamw, next_token_loss, tokens


def parameter(value=0.0):
    return nn.Parameter(torch.full((3,), value))


def lagging(ignores=lambda waiting, awaited: False, eager=(), **options):
    return StateOffloader("cpu", device_module=LaggingDevice(ignores, eager), always_copy=True, **options)


def give_and_leave(offloader, states):
    """A step whose group then leaves the device."""
    offloader.take(states)
    offloader.give(states)
    offloader.hold([])


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
    give_and_leave(offloader, {a: state})
    give_and_leave(offloader, {b: {"m": torch.zeros(3)}})
    taken = offloader.take([a])[a]
    assert taken["step"] == 3
    assert taken["moments"][0].tolist() == [1, 1, 1]
    assert taken["moments"][1]["x"].tolist() == [0, 1, 2]
    assert taken["name"] == "a"


def test_tensors_of_objects_move_with_the_rest():
    """GaLore keeps its projections so, and makes a new one in place of the old one."""
    offloader, a, b = lagging(), parameter(), parameter()
    projector = SimpleNamespace(rank=2, matrix=torch.ones(3), history=[torch.zeros(2)], cls=nn.Linear)
    give_and_leave(offloader, {a: {"projector": projector}})
    assert offloader.host_bytes == 12 + 8
    give_and_leave(offloader, {b: {"m": torch.zeros(3)}})
    taken = offloader.take([a])[a]["projector"]
    assert taken.matrix.tolist() == [1, 1, 1]
    assert (taken.rank, taken.cls, taken.history[0].tolist()) == (2, nn.Linear, [0, 0])
    taken.matrix = torch.full((4,), 5.0)
    give_and_leave(offloader, {a: {"projector": taken}})
    offloader.drain()
    assert offloader.state_of(a)["projector"].matrix.tolist() == [5, 5, 5, 5]


def make_slot(offloader):
    """Let a first group come and go; its slot stays for the next ones."""
    p = parameter()
    give_and_leave(offloader, {p: {"m": torch.ones(3)}})
    offloader.take([p])
    offloader.hold([])


def test_hold_prefetches_what_comes_next():
    device = LaggingDevice()
    offloader = StateOffloader("cpu", device_module=device, always_copy=True)
    make_slot(offloader)
    p = parameter()
    give_and_leave(offloader, {p: {"m": torch.ones(3)}})
    released = device.copies
    offloader.hold([p])
    assert device.copies == released + 1
    assert offloader.take([p])[p]["m"].tolist() == [1, 1, 1]
    assert device.copies == released + 1


def test_a_larger_slot_is_made_only_when_the_smaller_one_has_been_left():
    offloader, small, large = lagging(), parameter(), nn.Parameter(torch.zeros(99))
    make_slot(offloader)
    offloader.put({small: {"m": torch.ones(3)}, large: {"m": torch.ones(99)}})
    for _ in range(3):
        for p in (small, large):
            offloader.hold([p])
            assert offloader.device_bytes <= 448  # 99 times 4, rounded up to 64
            offloader.give(offloader.take([p]))
            assert offloader.device_bytes <= 448
    assert offloader.device_bytes == 448


def test_without_prefetch_the_copy_waits_for_the_step():
    device = LaggingDevice()
    offloader = StateOffloader("cpu", prefetch=False, device_module=device, always_copy=True)
    p = parameter()
    give_and_leave(offloader, {p: {"m": torch.ones(3)}})
    released = device.copies
    offloader.hold([p])
    assert device.copies == released
    offloader.take([p])
    assert device.copies == released + 1


def test_a_prefetch_for_another_group_is_dropped_unharmed():
    offloader, a, b = lagging(), parameter(), parameter()
    give_and_leave(offloader, {a: {"m": torch.ones(3)}})
    give_and_leave(offloader, {b: {"m": torch.zeros(3)}})
    offloader.hold([a])
    offloader.hold([b])
    assert offloader.take([b])[b]["m"].tolist() == [0, 0, 0]
    assert offloader.take([a])[a]["m"].tolist() == [1, 1, 1]


def test_host_memory_is_allocated_once_per_tensor():
    offloader, p = lagging(), parameter()
    give_and_leave(offloader, {p: {"m": torch.ones(3)}})
    first = offloader.state_of(p)["m"].data_ptr()
    give_and_leave(offloader, offloader.take([p]))
    offloader.drain()
    assert offloader.state_of(p)["m"].data_ptr() == first


def test_offload_none_keeps_state_on_the_device():
    device = LaggingDevice()
    offloader, p = StateOffloader("cpu", "none", device_module=device, always_copy=True), parameter()
    give_and_leave(offloader, {p: {"m": torch.ones(3)}})
    assert device.copies == 0
    assert offloader.device_bytes == 12
    assert offloader.host_bytes == 0
    offloader.release_all()
    assert offloader.device_bytes == 0
    assert offloader.state_of(p)["m"].tolist() == [1, 1, 1]


def test_bytes():
    offloader, a, b = lagging(), parameter(), parameter()
    give_and_leave(offloader, {a: {"m": torch.ones(3), "v": torch.ones(3)}})
    offloader.give({b: {"m": torch.ones(3)}})
    # What is being released still is on the device.
    assert (offloader.device_bytes, offloader.host_bytes) == (12 + 24, 24)
    offloader.drain()
    assert (offloader.device_bytes, offloader.host_bytes) == (12, 24)


def test_put_copies_and_keeps_named_tensors_on_the_host():
    device = LaggingDevice()
    offloader, p = StateOffloader("cpu", device_module=device, always_copy=True), parameter()
    given = torch.ones(3)
    offloader.put({p: {"step": torch.tensor(1.0), "m": given}}, stays_on_host=("step",))
    given.zero_()
    taken = offloader.take([p])[p]
    assert device.copies == 1
    assert taken["m"].tolist() == [1, 1, 1]


def test_unknown_tier():
    with pytest.raises(ValueError, match="offload='cloud'; choose one of 'host', 'disk', 'none'"):
        StateOffloader("cpu", "cloud")


def steps_on(offloader, steps=7, repeats=1):
    """Weights and final state after a few steps; ``repeats`` steps the same batch's group several times."""
    model = Net()
    engine = HiFTEngine.attach(
        model, adamw(model.parameters()), make_offloader=lambda: offloader, advance_on_step=False
    )
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
        give_and_leave(offloader, {p: {"m": torch.ones(3)}})
        offloader.hold([p])
        return offloader.take([p])[p]["m"].tolist()

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
    engine = HiFTEngine.attach(
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
    assert {"HiFT::fetch", "HiFT::release", "HiFT::wait_for_state", "HiFT::lend", "HiFT::take_back"} <= names


def test_exposed_milliseconds():
    """The double takes a millisecond for each copy and makes none before somebody waits for it."""
    offloader, p = lagging(), parameter()
    assert offloader.exposed_ms() == 0
    make_slot(offloader)
    offloader.drain()
    offloader.end_step()
    offloader.exposed_ms()
    offloader.put({p: {"m": torch.ones(3)}})
    offloader.hold([p])
    offloader.take([p])
    offloader.take([p])
    offloader.end_step()
    assert offloader.exposed_ms() == 1
    offloader.take([p])
    offloader.end_step()
    assert offloader.exposed_ms() == 0
