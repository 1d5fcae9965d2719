"""A device module whose side-stream copies lag, so that a missing wait shows on a machine without a GPU.

A copy that is issued inside ``with device.stream(side_stream)`` does not take place. Its destination is poisoned, and
the real copy is made only when something waits for an event that the side stream recorded after it. Then it reads its
source as it is by that time. Memory that was freed before its copy took place is an error, as is a side stream that
copies without having waited for the compute stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LaggingEvent:
    def __init__(self, stream: LaggingStream, position: int) -> None:
        self.stream = stream
        self._position = position

    def synchronize(self) -> None:
        self.stream.run_until(self._position)


class LaggingStream:
    def __init__(self, name: str, ignores: Callable[[str, str], bool]) -> None:
        self.name = name
        self._ignores = ignores
        self._queue: list[Callable[[], None]] = []
        self._done = 0
        self.waited_for_compute = False

    def record_event(self) -> LaggingEvent:
        return LaggingEvent(self, len(self._queue))

    def wait_event(self, event: LaggingEvent) -> None:
        if self._ignores(self.name, event.stream.name):
            return
        if event.stream.name == "compute":
            self.waited_for_compute = True
        elif self.name == "compute":
            event.synchronize()
        else:
            self._queue.append(event.synchronize)

    def add_copy(self, destination: Tensor, source: Tensor) -> None:
        if not self.waited_for_compute:
            raise AssertionError(f"The {self.name} stream copies without having waited for the compute stream.")
        to, from_ = weakref.ref(destination), weakref.ref(source)

        def copy() -> None:
            target, origin = to(), from_()
            if target is None or origin is None:
                raise AssertionError(f"Memory was freed while the {self.name} stream was still copying.")
            target.copy_(origin)

        destination.fill_(torch.nan if destination.is_floating_point() else 77)
        self._queue.append(copy)

    def run_until(self, position: int) -> None:
        while self._done < position:
            self._done += 1
            self._queue[self._done - 1]()


class LaggingDevice:
    """Stands in for ``torch.cuda``. ``ignores(waiting, awaited)`` drops waits between streams of those names."""

    def __init__(self, ignores: Callable[[str, str], bool] = lambda waiting, awaited: False) -> None:
        self._ignores = ignores
        self._names = iter(["fetch", "release"])
        self._current = LaggingStream("compute", ignores)
        self.copies = 0

    def Stream(self, device: torch.device) -> LaggingStream:
        return LaggingStream(next(self._names), self._ignores)

    def current_stream(self, device: torch.device) -> LaggingStream:
        return self._current

    @contextmanager
    def stream(self, stream: LaggingStream) -> Iterator[None]:
        before, self._current = self._current, stream
        stream.waited_for_compute = False
        try:
            with _Deferring(self, stream):
                yield
        finally:
            self._current = before


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
