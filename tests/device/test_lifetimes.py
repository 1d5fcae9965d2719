"""Memory of host and device that goes, while copies that were queued may still use it."""

from __future__ import annotations

import copy
import gc
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_hift import HFT, LISA, StateOffloader
from lightning_hift.offload.host_memory import HostMemory
from tests.matrices import crossed
from tests.models import Net, adamw, attach_published, next_token_loss, tokens

pytestmark = pytest.mark.device

PLACES: dict[str, dict[str, Any]] = {
    "host": {},
    "late": {"prefetch": False},
    "pageable": {"pin_memory": False},
    "disk": {"offload": "disk"},
    "resident": {"offload": "none"},
}
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "split": lambda: {"master_weights": "split"},
    "full": lambda: {"master_weights": "full"},
    "always_active": lambda: {"always_active": ["embedding"]},
    "slices": lambda: {"max_group_numel": 100},
    "LISA": lambda: {"policy": LISA(1, 3, "reset")},
    "HFT": lambda: {"policy": HFT(3, "reset")},
}


class Run:
    """A model under an engine on the device, with a slow link to the host."""

    def __init__(self, softgpu: Any, folder: Any, place: str = "host", options: str = "plain") -> None:
        softgpu.set_delays(side=(500, 2500))
        chosen = OPTIONS[options]()
        self.model = Net().to("softgpu", torch.bfloat16 if "master_weights" in chosen else torch.float32)
        self.optimizer = adamw(self.model.parameters())
        directory = {"directory": folder} if place == "disk" else {}
        self.options = {
            "make_offloader": lambda: StateOffloader("softgpu", **PLACES[place], **directory),
            **chosen,
        }
        self.attach()

    def attach(self) -> None:
        self.engine = attach_published(self.model, self.optimizer, **self.options)

    def step(self, first: int, last: int) -> None:
        for batch in tokens(20)[first:last]:
            next_token_loss(self.model, batch.to("softgpu")).backward()
            self.optimizer.step()


def close(run: Run) -> None:
    run.engine.close()


def drop(run: Run) -> None:
    del run.engine, run.optimizer


def save_and_close(run: Run) -> None:
    run.optimizer.state_dict()
    run.engine.close()


def close_and_step(run: Run) -> None:
    run.engine.close()
    run.step(7, 8)


def close_and_attach(run: Run) -> None:
    run.engine.close()
    run.attach()
    run.step(7, 14)


def roll_back(run: Run) -> None:
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    run.step(7, 10)
    run.model.load_state_dict(saved[0])
    run.optimizer.load_state_dict(saved[1])
    run.step(7, 10)


def fail_in_a_step(run: Run) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    hook = run.optimizer.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run.step(7, 8)
    hook.remove()
    run.engine.close()


ENDS = [close, drop, save_and_close, close_and_step, close_and_attach, roll_back, fail_in_a_step]


@pytest.mark.parametrize(("end", "options", "place"), crossed(ENDS, OPTIONS, PLACES))
@pytest.mark.filterwarnings("ignore:The optimizer is stepped after HiFT was closed")
def test_nothing_goes_while_it_is_copied(end, options, place, softgpu, tmp_path):
    run = Run(softgpu, tmp_path, place, options)
    run.step(0, 7)
    end(run)
    model = run.model
    del run
    gc.collect()
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_engine_that_is_dropped_writes_into_nobodys_memory(softgpu, tmp_path):
    run = Run(softgpu, tmp_path)
    run.step(0, 8)
    softgpu.synchronize()
    softgpu.set_delays(side=(30_000, 30_000))
    run.step(8, 9)  # and the state of the next group is on its way
    slot = run.engine.offloader._transfers.slot.memory
    begin, nbytes = slot.data_ptr(), slot.numel()
    del run, slot
    gc.collect()
    others = [torch.full((nbytes // 4,), 7.0, device="softgpu") for _ in range(60)]
    assert any(t.data_ptr() <= begin < t.data_ptr() + nbytes for t in others)
    softgpu.synchronize()
    assert all((t == 7).all() for t in others)


def test_state_that_is_resident_leaves_nothing_on_the_host(softgpu, tmp_path, monkeypatch):
    locked: dict[int, int] = {}
    runtime = softgpu.cudart()

    class Counting(runtime):  # type: ignore[misc, valid-type]
        @classmethod
        def cudaHostRegister(cls, address, nbytes, flags):
            locked[address] = nbytes
            return runtime.cudaHostRegister(address, nbytes, flags)

        @classmethod
        def cudaHostUnregister(cls, address):
            del locked[address]
            return runtime.cudaHostUnregister(address)

    monkeypatch.setattr(softgpu, "cudart", lambda: Counting)
    first, second = Run(softgpu, tmp_path, "resident"), Run(softgpu, tmp_path, "resident")
    first.step(0, 8)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert locked
    second.step(8, 16)
    gc.collect()
    assert not locked
    assert second.engine.offloader.host_bytes == 0


def test_a_fork_leaves_page_locked_memory_alone(softgpu, monkeypatch):
    unlocked = []
    unlock = softgpu.cudart().cudaHostUnregister
    note = lambda address: (unlocked.append(address), unlock(address))  # noqa: E731
    monkeypatch.setattr(softgpu.cudart(), "cudaHostUnregister", note)
    memory = HostMemory(torch.device("softgpu")).allocate([torch.empty(10)])
    child = os.fork()
    if child == 0:
        del memory
        os._exit(len(unlocked))
    assert os.waitpid(child, 0)[1] == 0
    del memory
    assert len(unlocked) == 1


def test_a_fork_waits_for_no_copy(softgpu, tmp_path):
    """There are no streams in it that could ever make one."""
    run = Run(softgpu, tmp_path)
    run.step(0, 8)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        run.engine.offloader._transfers.finish()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    run.step(8, 9)
