"""Each wait is needed: without it, the device shows an access that nothing orders, or memory that goes too early."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from lightning_hift.offload.offloader import StateOffloader
from lightning_hift.offload.transfers import Transfers
from tests.device.test_lifetimes import Run

pytestmark = pytest.mark.device


def train(run: Run) -> None:
    run.step(0, 12)


def save(run: Run) -> None:
    run.step(0, 7)
    copy.deepcopy(run.optimizer.state_dict())


def roll_back(run: Run) -> None:
    run.step(0, 8)
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.step(8, 9)
    run.optimizer.load_state_dict(saved)
    run.step(9, 14)


def there_and_back(run: Run) -> None:
    """State from outside the slot leaves, and is wanted again at once."""
    run.step(0, 7)
    offloader, state = run.engine.offloader, run.engine._stepper.turns[4].state
    offloader.drop(state)
    offloader.hold(None)
    offloader.take([state])
    offloader.give(state, {owner: {"m": torch.ones(4, device="softgpu")} for owner in state.owners})
    offloader.hold(None)
    offloader.hold(state)
    offloader.take([state])


def grow(run: Run) -> None:
    """The slot is made anew for a group that has become larger."""
    run.step(0, 10)
    state = run.engine._stepper.turns[1].state
    run.engine.offloader.hold(state)
    states = run.engine.offloader.take([state])
    for values in states.values():
        values["more"] = torch.zeros(500, device="softgpu")
    run.engine.offloader.give(state, states)
    run.engine.offloader.hold(run.engine._stepper.turns[2].state)
    run.engine.offloader.take([run.engine._stepper.turns[2].state])
    run.engine.offloader.hold(state)
    run.engine.offloader.take([state])
    torch.empty(4000, device="softgpu").fill_(1.0)


class Mutation(NamedTuple):
    """A line that is left out, and what shows it."""

    where: Callable[..., Any]
    line: str
    instead: str
    course: Callable[[Run], None]
    place: str = "host"
    options: str = "plain"


MUTATIONS = {
    "a save waits for the step": Mutation(Transfers._copy, "stream.wait_event(begin)", "pass", train),
    "a load waits for what was there": Mutation(Transfers._copy, "stream.wait_event(free)", "pass", train),
    "a load waits for the save to its place": Mutation(
        Transfers._copy, "stream.wait_event(_event(after))", "pass", there_and_back
    ),
    "the step waits for the load": Mutation(Transfers.wait, "compute.wait_event(_event(event))", "pass", train),
    "without prefetch, what leaves is waited for": Mutation(
        StateOffloader._settle, "self._transfers.wait(event)", "pass", train, "late"
    ),
    "a slot is waited for before it is given up": Mutation(
        StateOffloader._find_memory, "transfers.wait(self._left_slot)", "pass", grow
    ),
    "who reads the host waits": Mutation(StateOffloader.drain, "self._transfers.finish()", "pass", save),
    "who writes to the host waits": Mutation(StateOffloader.drain, "self._transfers.finish()", "pass", roll_back),
}


def mutate(monkeypatch: pytest.MonkeyPatch, mutation: Mutation) -> None:
    source = textwrap.dedent(inspect.getsource(mutation.where))
    assert source.count(mutation.line) == 1
    known: dict[str, Any] = {}
    exec(source.replace(mutation.line, mutation.instead), vars(sys.modules[mutation.where.__module__]), known)
    kind = {"Transfers": Transfers, "StateOffloader": StateOffloader}[mutation.where.__qualname__.split(".")[0]]
    monkeypatch.setattr(kind, mutation.where.__name__, known[mutation.where.__name__])


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_wait_is_needed(name, softgpu, tmp_path, monkeypatch):
    mutation = MUTATIONS[name]

    def go() -> list[str]:
        run = Run(softgpu, tmp_path, mutation.place, mutation.options)
        mutation.course(run)
        del run
        gc.collect()
        softgpu.synchronize()
        found = [*softgpu.races, *softgpu.violations()]
        softgpu.races.clear()
        return found

    assert not go()
    with monkeypatch.context() as patch:
        mutate(patch, mutation)
        assert go()
