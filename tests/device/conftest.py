"""Every test here runs with random delays on all streams, and fails on an access that nothing orders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hift.offload.transfers import Transfers


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A process in which the device is registered is no place for other tests, so it takes ``-m device``."""
    return None if "device" in config.getoption("-m") else True


@pytest.fixture(scope="session")
def softgpu() -> ModuleType:
    from tests.device.softgpu import missing_tools, register

    if missing := missing_tools():
        pytest.skip(f"needs {' and '.join(missing)} to build the device")
    return register()


@pytest.fixture(autouse=True)
def all_is_ordered(softgpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Transfers, "__init__", _with_a_thread_of_its_own(softgpu, Transfers.__init__))
    softgpu.set_delays(compute=(0, 50), side=(0, 1000))
    softgpu.violations()
    softgpu.set_race_check(True)
    with HostRaces(softgpu):
        yield
    softgpu.synchronize()
    found = [*softgpu.races, *softgpu.violations()]
    softgpu.set_race_check(False)
    softgpu.set_delays()
    assert not found, "\n".join(dict.fromkeys(found))


class HostRaces(TorchDispatchMode):
    """Looks at operations of the host on page-locked memory to or from which copies may be under way."""

    def __init__(self, device: ModuleType) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view reads nothing: it has alias information that does not say that it writes.
        touched = [
            (t, argument.alias_info is not None)
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is None or argument.alias_info.is_write
            for t in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(t, Tensor) and t.layout == torch.strided and t.numel()
        ]
        if all(t.device.type == "cpu" for t, _ in touched):
            for t, writes in touched:
                if self._device.pin_kind(t.data_ptr()):
                    self._device.check_host(t.data_ptr(), t.numel() * t.element_size(), writes, str(func))
        return func(*args, **(kwargs or {}))


def _with_a_thread_of_its_own(device: ModuleType, initialize: Any) -> Any:
    """The thread that copies knows what the host knew when it was told to, and what it learns stays there."""

    def __init__(self: Transfers, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        if self._thread is not None:
            submit = self._thread.submit
            submit(device.isolate_thread).result()

            def submit_in_order(task: Any) -> Any:
                clock = device.export_clock()
                return submit(lambda: (device.import_clock(clock), task())[1])

            self._thread.submit = submit_in_order  # type: ignore[method-assign, assignment]

    return __init__
