"""A device module whose side-stream copies lag, so that a missing wait shows on a machine without a GPU.

A copy that is issued inside ``with device.stream(side_stream)`` does not take place. Its destination is poisoned, and
the real copy is made only when something waits for an event that the side stream recorded after it. Then it reads its
source as it is by that time. Memory that was freed before its copy took place is an error, as is a side stream that
copies without having waited for the compute stream.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_hift import StateOffloader


class LaggingEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self.stream: LaggingStream | None = None
        self._position = 0
        self._copies_before = 0

    def record(self, stream: LaggingStream) -> None:
        self.stream = stream
        self._position = stream.length
        self._copies_before = stream.device.copies_done

    @property
    def has_happened(self) -> bool:
        return self.stream is None or self.stream.has_done(self._position)

    def synchronize(self) -> None:
        """The host waits."""
        assert self.stream is not None
        self.stream.device.host_waits += 1
        self.stream.run_until(self._position)

    def happen(self) -> None:
        """A stream waits."""
        assert self.stream is not None
        self.stream.run_until(self._position)

    def query(self) -> bool:
        return self.has_happened

    def elapsed_time(self, end: LaggingEvent) -> float:
        """Takes every copy to last a millisecond, all of it waited for."""
        return float(end._copies_before - self._copies_before)


class LaggingStream:
    def __init__(self, name: str, device: LaggingDevice) -> None:
        self.name = name
        self.device = device
        self._queue: list[Callable[[], None]] = []
        self._done = 0
        self._waits: dict[int, LaggingEvent] = {}
        self.waited_for_compute = False

    @property
    def length(self) -> int:
        return len(self._queue)

    def has_done(self, position: int) -> bool:
        return self._done >= position

    def record_event(self) -> LaggingEvent:
        event = LaggingEvent()
        event.record(self)
        return event

    def wait_event(self, event: LaggingEvent) -> None:
        assert event.stream is not None
        if self.device.ignores(self.name, event.stream.name):
            return
        if event.stream.name == "compute":
            self.waited_for_compute = True
        elif self.name == "compute":
            event.happen()
        else:
            self._waits[len(self._queue)] = event
            self._queue.append(event.happen)

    def add_copy(self, destination: Tensor, source: Tensor) -> None:
        with self.device.lock:
            self._add_copy(destination, source)

    def _add_copy(self, destination: Tensor, source: Tensor) -> None:
        if not self.waited_for_compute:
            raise AssertionError(f"The {self.name} stream copies without having waited for the compute stream.")
        to, from_ = weakref.ref(destination.untyped_storage()), weakref.ref(source.untyped_storage())
        # Views of the same memory, which do not keep it alive.
        target_of, origin_of = _reopened(destination), _reopened(source)

        def alive() -> tuple[Tensor, Tensor]:
            target, origin = to(), from_()
            if target is None or origin is None:
                self.device.failed = True
                raise AssertionError(f"Memory was freed while the {self.name} stream was still copying.")
            return target_of(target), origin_of(origin)

        def poison() -> None:
            target, _ = alive()
            target.fill_(torch.nan if target.is_floating_point() else 77)

        def copy() -> None:
            target, origin = alive()
            target.copy_(origin)
            self.device.copies_done += 1

        # As early as its waits allow, the destination is overwritten; as late as they allow, it gets its values.
        free = all(event.has_happened for at, event in self._waits.items() if at >= self._done)
        if free:
            poison()
        else:
            self._queue.append(poison)
        self._queue.append(copy)
        if free and self.name in self.device.eager:
            self.run_until(self.length)

    def run_until(self, position: int) -> None:
        # Whatever stream is issuing copies just now: the one of an offloader that is collected may have to end first.
        with self.device.lock, _disable_current_modes():
            while self._done < position and not self.device.failed:
                self._done += 1
                self._queue[self._done - 1]()


def _reopened(tensor: Tensor) -> Callable[[torch.UntypedStorage], Tensor]:
    dtype, offset, size, stride = tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()
    return lambda storage: torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, size, stride)


class LaggingDevice:
    """Stands in for ``torch.cuda``. ``ignores(waiting, awaited)`` drops waits between streams of those names.

    The streams named in ``eager`` copy as early as their waits allow, not as late.
    """

    Event = LaggingEvent

    def __init__(
        self, ignores: Callable[[str, str], bool] = lambda waiting, awaited: False, eager: Collection[str] = ()
    ) -> None:
        self.ignores = ignores
        self.eager = eager
        self._names = iter(["load", "save"])
        self._compute = LaggingStream("compute", self)
        self._local = threading.local()
        self.lock = threading.RLock()  # copies may be issued in a thread
        self.copies = 0
        self.copies_done = 0
        self.host_waits = 0
        self.failed = False  # once a fault was found, no more copies take place

    def Stream(self, device: torch.device) -> LaggingStream:
        return LaggingStream(next(self._names), self)

    def current_stream(self, device: torch.device) -> LaggingStream:
        return getattr(self._local, "stream", self._compute)

    @contextmanager
    def stream(self, stream: LaggingStream) -> Iterator[None]:
        before, self._local.stream = self.current_stream(torch.device("cpu")), stream
        stream.waited_for_compute = False
        try:
            with _Deferring(self, stream):
                yield
        finally:
            self._local.stream = before


class _Deferring(TorchDispatchMode):
    def __init__(self, device: LaggingDevice, stream: LaggingStream) -> None:
        super().__init__()
        self._device = device
        self._stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        self._device.copies += 1
        self._stream.add_copy(args[0], args[1])
        return args[0]


def lagging(**options: Any) -> StateOffloader:
    """An offloader that copies, on such a device."""
    return StateOffloader("cpu", device_module=LaggingDevice(), always_copy=True, **options)
