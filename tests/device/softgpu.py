"""The software accelerator "softgpu": a device of torch's whose streams are threads. See ``softgpu.cpp``.

After ``register``, which builds it the first time, ``torch.softgpu`` offers what ``torch.cuda`` does, as far as it is
used here, and ``Trainer(accelerator="softgpu", devices=1)`` trains on it. It says nothing about speed.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

NAME = "softgpu"
SOURCE = Path(__file__).with_name("softgpu.cpp")
FLAGS = ["-O1", "-std=c++20", "-Wno-deprecated-declarations"]


def missing_tools() -> list[str]:
    """What has to be installed before the device can be built."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where pip puts ninja
    return [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]


def register() -> ModuleType:
    """Build the device, the first time, and make torch and Lightning know it. Returns ``torch.softgpu``."""
    from torch.utils.cpp_extension import load

    known: ModuleType | None = sys.modules.get(f"torch.{NAME}")
    if known is not None:
        return known
    module = _make_module(load("softgpu_device", [str(SOURCE)], extra_cflags=FLAGS))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, module)
    sys.modules[module.__name__] = module
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    AcceleratorRegistry.register(NAME, SoftGpuAccelerator, description="software accelerator")
    return module


class SoftGpuAccelerator(Accelerator):
    """For the Trainer."""

    def setup_device(self, device: torch.device) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return list(range(devices)) if isinstance(devices, int) else [0]

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device(NAME, index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


_choose_strategy = _AcceleratorConnector._choose_strategy


def _choose_single_device(connector: Any) -> Any:
    """Lightning takes the CPU as the single device of an accelerator that it does not know."""
    chosen = _choose_strategy(connector)
    is_own = connector._accelerator_flag == NAME and type(chosen) is SingleDeviceStrategy
    return SingleDeviceStrategy(device=torch.device(NAME, 0)) if is_own else chosen


_AcceleratorConnector._choose_strategy = _choose_single_device  # type: ignore[method-assign]


class Runtime:
    """What ``torch.cuda.cudart()`` offers for page-locking."""

    backend: Any

    @classmethod
    def cudaHostRegister(cls, address: int, nbytes: int, flags: int) -> int:
        return int(cls.backend.host_register(address, nbytes))

    @classmethod
    def cudaHostUnregister(cls, address: int) -> int:
        return int(cls.backend.host_unregister(address))

    @staticmethod
    def cudaGetErrorString(code: int) -> str:
        return f"error {code}"


class Stream(torch.Stream):
    """As ``torch.cuda.Stream``."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        place = {} if "stream_id" in kwargs else {"device": torch.device(NAME, _index(device)), "priority": priority}
        made: Stream = super().__new__(cls, **place, **kwargs)
        return made


def _index(device: Any = None) -> int:
    index = device if isinstance(device, int) or device is None else torch.device(device).index
    return int(Runtime.backend.current_device() if index is None else index)


def _event(enable_timing: bool = False, **kwargs: Any) -> torch.Event:
    return torch.Event(device=NAME, enable_timing=enable_timing)  # elapsed_time takes no subclass


@contextmanager
def _stream(stream: torch.Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    before = torch._C._accelerator_getStream(_index(stream.device))
    torch._C._accelerator_setStream(stream)
    try:
        yield
    finally:
        torch._C._accelerator_setStream(before)


@contextmanager
def _device(device: Any) -> Iterator[None]:
    before = Runtime.backend.current_device()
    Runtime.backend.set_device(_index(device))
    try:
        yield
    finally:
        Runtime.backend.set_device(before)


def _stack() -> str:
    """Where we are, innermost first, without this file."""
    frames = [frame for frame in traceback.extract_stack()[:-2] if not frame.filename.endswith("softgpu.py")]
    return " <- ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-14:]))


def _make_module(backend: Any) -> ModuleType:
    Runtime.backend = backend
    syncs: list[str] = []  # host syncs, while they are listed
    races: list[str] = []  # accesses that nothing orders, while they are watched for

    def note_sync(kind: str, op: str) -> None:
        syncs.append(f"{kind} {op} at {_stack()}")

    def note_race(message: str, op: str) -> None:
        races.append(f"{message} at {threading.current_thread().name}: {_stack()}")

    def set_sync_debug_mode(mode: str) -> None:
        """``"default"``; ``"warn"``: list host syncs in ``syncs``; ``"error"``: refuse them."""
        syncs.clear()
        backend.set_sync_mode({"default": 0, "warn": 1, "error": 2}[mode], note_sync)

    def set_race_check(on: bool) -> None:
        """Whether to list unordered accesses in ``races``."""
        races.clear()
        backend.races(True)
        backend.set_race_check(on, note_race)

    def memory(device: Any = None) -> dict[str, int]:
        found: dict[str, int] = backend.memory(_index(device))
        return found

    def free_and_total(device: Any = None) -> tuple[int, int]:
        found = memory(device)
        return found["limit"] - found["reserved"], found["limit"]

    def generator(device: Any = None) -> torch.Generator:
        found: torch.Generator = backend.default_generator(_index(device))
        return found

    def seed_all(seed: int) -> None:
        for index in range(backend.device_count()):
            generator(index).manual_seed(seed)

    def properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name=NAME, total_memory=memory(device)["limit"], major=9, minor=0)

    module = ModuleType(f"torch.{NAME}")
    module.__dict__.update(
        # of torch.cuda
        Stream=Stream,
        Event=_event,
        stream=_stream,
        current_stream=lambda device=None: torch._C._accelerator_getStream(_index(device)),
        set_stream=torch._C._accelerator_setStream,
        device=_device,
        current_device=backend.current_device,
        set_device=lambda device: backend.set_device(_index(device)),
        device_count=backend.device_count,
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        _lazy_init=lambda: None,
        init=lambda: None,
        synchronize=lambda device=None: backend.synchronize(_index(device)),
        empty_cache=backend.empty_cache,
        memory_allocated=lambda device=None: memory(device)["allocated"],
        max_memory_allocated=lambda device=None: memory(device)["allocated_peak"],
        memory_reserved=lambda device=None: memory(device)["reserved"],
        max_memory_reserved=lambda device=None: memory(device)["reserved_peak"],
        reset_peak_memory_stats=lambda device=None: backend.reset_peak(_index(device)),
        mem_get_info=free_and_total,
        manual_seed=lambda seed: generator().manual_seed(seed),
        manual_seed_all=seed_all,
        get_rng_state=lambda device=None: generator(device).get_state(),
        set_rng_state=lambda state, device=None: generator(device).set_state(state),
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        get_device_properties=properties,
        cudart=lambda: Runtime,
        set_sync_debug_mode=set_sync_debug_mode,
        # beyond it
        syncs=syncs,
        races=races,
        set_race_check=set_race_check,
        violations=lambda: backend.violations(True),  # memory that went while a copy used it; forgets them
        set_delays=lambda compute=(0, 0), side=(0, 0): backend.set_delays(*compute, *side),  # microseconds, at random
        sleep=backend.sleep,
        set_memory_limit=lambda nbytes, device=None: backend.set_memory_limit(_index(device), nbytes),
        isolate_thread=backend.isolate_thread,
        export_clock=backend.export_clock,
        import_clock=backend.import_clock,
        check_host=backend.check_host,
        pin_kind=backend.pin_kind,
    )
    return module
