"""Copies between host and device that nobody waits for before he must.

Note [Streams]
    State is needed on the device only while its group is stepped, so it is copied during the rest of the batch, on two
    side streams that run beside the compute stream (the current one) and, in opposite directions, beside each other:

        compute   ... step(g0) | forward, backward of g1 ............ | step(g1) | ...
        save                   |-- g0: device to host --|
        load                    |-- g1: host to device --|

    Both groups share one slot of device memory: g1 is written, chunk by chunk, where g0 has just been read. Five waits
    make this safe. Each is an event, so the host never blocks on the step path:
      1. the side streams wait for the compute stream: the step must have finished, and kernels queued earlier may still
         use memory that the allocator has just handed out;
      2. a chunk is loaded only after what was there has been saved, or g0's state would be lost;
      3. state is loaded only after a save to the same place on the host, or a half-written copy would be read;
      4. the compute stream waits for the load before the step, or the step would read a half-written device copy;
      5. the compute stream waits for the save before tensors outside the slot are freed, or the allocator could hand
         their memory out while it is still being read.
    Host memory is read, written and freed by the host, which no stream holds back. So each copy keeps its host tensors
    alive until it is over, and ``finish`` lets the host wait for all copies before it reads or writes. If this object
    goes while copies are under way, it waits for them, too.

    Why one slot and not two: it hides the copies behind the same step, a chunk's time later, at half the memory.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; kernels read 16 at a time
_CHUNK = 2**26  # bytes; small against a group, and long enough for full speed


class _Copy(NamedTuple):
    """A copy with the tensors that it reads and writes."""

    end: Any  # an event, or the future one of a thread
    host: list[Tensor]
    device: list[Tensor]


class DeviceSlot:
    """A stretch of device memory in which the state of one group takes the place of that of the group before it.

    Args:
        nbytes: Its size.
        device: Where it is.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._saved: list[tuple[int, Any]] = []

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.memory.numel()

    def cut(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors from the start of the slot on, with the shapes, strides and dtypes of the dense tensors ``like``."""
        pieces, start = [], 0
        for tensor in like:
            end = start + _nbytes(tensor)
            pieces.append(self.memory[start:end].view(tensor.dtype).as_strided(tensor.shape, tensor.stride()))
            start = _aligned(end)
        return pieces

    def end_of(self, tensor: Tensor) -> int | None:
        """Where in the slot a dense ``tensor`` ends, in bytes; ``None`` if it lies elsewhere."""
        start = tensor.data_ptr() - self.memory.data_ptr()
        return start + _nbytes(tensor) if 0 <= start < self.nbytes else None

    def forget_saved(self) -> None:
        """A new turn of saving begins, from the start of the slot to its end."""
        self._saved = []

    def note_saved(self, end: int, event: Any) -> None:
        """All up to byte ``end`` is saved once ``event`` has happened."""
        self._saved.append((end, event))

    def may_write_after(self, end: int) -> Any | None:
        """The event after which the slot may be written up to byte ``end``; ``None``: now."""
        return next(
            (event for saved, event in self._saved if saved >= end), self._saved[-1][1] if self._saved else None
        )


def slot_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that a slot needs for ``tensors``."""
    return sum(_aligned(_nbytes(tensor)) for tensor in tensors)


class Transfers:
    """Saves device tensors to the host and loads them back, each direction on a stream of its own.

    What is saved and loaded is kept alive: on the device until its event was waited for, on the host until it is over.

    Args:
        device: A device with streams.
        in_thread: Copy in a thread, because the host takes part in it: its memory is pageable or a file.
        device_module: Streams and events; default ``torch.get_device_module(device)``.
    """

    def __init__(self, device: torch.device, in_thread: bool = False, device_module: Any = None) -> None:
        self.device = device
        self.slot: DeviceSlot | None = None
        self._streams = device_module or torch.get_device_module(device)
        self._load_stream = self._streams.Stream(device=device)
        self._save_stream = self._streams.Stream(device=device)
        self._thread = ThreadPoolExecutor(1, "hift-copies") if in_thread else None
        self._under_way: dict[Any, deque[_Copy]] = {self._load_stream: deque(), self._save_stream: deque()}
        weakref.finalize(self, _finish, [*self._under_way.values()], os.getpid())
        self._step = 0
        self._waits: deque[tuple[int, Any, Any]] = deque(maxlen=256)
        self._sums: dict[int, float] = {}
        self._exposed_ms = 0.0

    def save(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copy each (device, host) pair to the host, those in the slot first. Returns the event that ends it."""
        slot, stream = self.slot, self._save_stream
        ends = {} if slot is None else {id(device): end for device, _ in pairs if (end := slot.end_of(device))}

        def copy() -> Any:
            if slot is not None:
                slot.forget_saved()
            stream.wait_event(stepped)  # Note [Streams] 1
            for device, host in sorted(pairs, key=lambda pair: ends.get(id(pair[0]), float("inf"))):
                for source, target in _chunks(device, host):
                    target.copy_(source, non_blocking=True)
                    if slot is not None and id(device) in ends:
                        end = slot.end_of(source)
                        assert end is not None
                        slot.note_saved(end, stream.record_event())
            return stream.record_event()

        stepped = self._streams.current_stream(self.device).record_event()
        return self._run(copy, stream, [host for _, host in pairs], [device for device, _ in pairs])

    def load(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any = None) -> Any:
        """Copy each (host, device) pair to the device, after the event ``after``. Returns the event that ends it."""
        slot, stream = self.slot, self._load_stream

        def copy() -> Any:
            stream.wait_event(allocated)  # Note [Streams] 1
            if (saved := _event(after)) is not None:
                stream.wait_event(saved)  # Note [Streams] 3
            for host, device in pairs:
                for source, target in _chunks(host, device):
                    end = slot.end_of(target) if slot is not None else None
                    free = slot.may_write_after(end) if slot is not None and end is not None else None
                    if free is not None:
                        stream.wait_event(free)  # Note [Streams] 2
                    target.copy_(source, non_blocking=True)
            return stream.record_event()

        allocated = self._streams.current_stream(self.device).record_event()
        return self._run(copy, stream, [host for host, _ in pairs], [device for _, device in pairs])

    def wait(self, event: Any) -> None:
        """Let the compute stream wait for ``event``; ``None`` has happened."""
        if event is not None:
            self._streams.current_stream(self.device).wait_event(_event(event))  # Note [Streams] 4, 5
            for copy in chain(*self._under_way.values()):
                if copy.end is event:
                    copy.device.clear()

    def finish(self) -> None:
        """Let the host wait until no copy is under way."""
        _finish(self._under_way.values(), os.getpid())

    @contextmanager
    def measure_exposed(self) -> Iterator[None]:
        """Measure how long the waits inside keep the compute stream from going on."""
        begin = self._now()
        yield
        self._waits.append((self._step, begin, self._now()))

    def end_step(self) -> None:
        """The waits from now on belong to the next step."""
        self._step += 1
        self._let_go()

    def exposed_ms(self) -> float:
        """Milliseconds that the waits of one step took: the last one for which it is known without waiting for it."""
        while self._waits and self._waits[0][2].query():
            step, begin, end = self._waits.popleft()
            self._sums[step] = self._sums.get(step, 0.0) + begin.elapsed_time(end)
        pending = min([step for step, *_ in self._waits], default=self._step)
        known = [step for step in self._sums if step < pending]
        if known:
            self._exposed_ms = self._sums[max(known)]
            self._sums = {step: total for step, total in self._sums.items() if step >= pending}
        return self._exposed_ms

    def _now(self) -> Any:
        event = self._streams.Event(enable_timing=True)
        event.record(self._streams.current_stream(self.device))
        return event

    def _run(self, copy: Callable[[], Any], stream: Any, host: list[Tensor], device: list[Tensor]) -> Any:
        def on_stream() -> Any:
            with self._streams.stream(stream):
                return copy()

        self._let_go()
        end = on_stream() if self._thread is None else self._thread.submit(on_stream)
        self._under_way[stream].append(_Copy(end, host, device))
        return end

    def _let_go(self) -> None:
        """Forget the copies that are over, but for the last one: to have waited for it is to have waited for all."""
        for copies in self._under_way.values():
            while len(copies) > 1 and _has_happened(copies[0].end):
                copies.popleft()


def _finish(under_way: Iterable[deque[_Copy]], process: int) -> None:
    """Let the host wait for all of ``under_way``, in the process that started them: a fork has no part in them."""
    if os.getpid() == process:
        for copies in under_way:
            while copies:
                _event(copies[0].end).synchronize()
                copies.popleft()


def _has_happened(event: Any) -> bool:
    return (not isinstance(event, Future) or event.done()) and bool(_event(event).query())


def _event(event: Any) -> Any:
    return event.result() if isinstance(event, Future) else event


def _chunks(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same elements of both, in stretches that are copied one at a time."""
    if source.stride() != target.stride():
        return iter([(source, target)])
    flat = (source.numel(),)
    flats = (source.as_strided(flat, (1,)), target.as_strided(flat, (1,)))
    sources, targets = (torch.split(tensor, max(1, _CHUNK // tensor.element_size())) for tensor in flats)
    return zip(sources, targets, strict=True)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
