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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hift.offload.exposure import Exposure
from lightning_hift.offload.group_state import ALIGNMENT, Flat
from lightning_hift.offload.staging import Staging, make_staging

_CHUNK = 2**26  # bytes; small against a group, and long enough for full speed


class _Copy(NamedTuple):
    """A copy with the tensors that it reads and writes."""

    end: Any  # an event, or the future one of a thread
    host: list[Tensor]
    device: list[Tensor]


class Slot:
    """A stretch of device memory in which the state of one group takes the place of that of the group before it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._read: list[tuple[int, int, Any]] = []

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.memory.numel()

    def cut(self, flats: Iterable[Flat]) -> list[Tensor]:
        """Memory for each of ``flats``, one after another from the start of the slot on."""
        found, start = [], 0
        for flat in flats:
            end = start + flat.numel * flat.dtype.itemsize
            found.append(self.memory[start:end].view(flat.dtype))
            start = -(-end // ALIGNMENT) * ALIGNMENT
        return found

    def range_of(self, tensor: Tensor) -> tuple[int, int] | None:
        """First byte and byte after the last one of a dense ``tensor`` in the slot; ``None`` if it lies elsewhere."""
        start = tensor.data_ptr() - self.memory.data_ptr()
        return (start, start + tensor.nbytes) if 0 <= start < self.nbytes else None

    def note_read(self, tensor: Tensor, event: Any) -> None:
        """``tensor`` has been read once ``event`` has happened."""
        if (found := self.range_of(tensor)) is not None:
            start, end = found
            # Reads happen one after another, so the last one of a stretch stands for those before.
            self._read = [(s, e, ended) for s, e, ended in self._read if s < start or end < e]
            self._read.append((start, end, event))

    def free_after(self, tensor: Tensor) -> Any | None:
        """The event after which ``tensor`` may be overwritten; ``None``: now."""
        if (found := self.range_of(tensor)) is None:
            return None
        start, end = found
        return next((event for s, e, event in reversed(self._read) if s < end and start < e), None)


class Transfers:
    """Saves device tensors to the host and loads them back, each direction on a stream of its own.

    What is saved and loaded is kept alive: on the host until it is over, on the device until its event was waited for.
    Before the slot is given up, both have to be waited for.

    Args:
        device: A device with streams.
        in_thread: Copy in a thread, because the host takes part in it: its memory is pageable or a file. The thread
            copies by way of two small page-locked buffers, if it can get them.
        device_module: Streams and events; default ``torch.get_device_module(device)``.
    """

    def __init__(self, device: torch.device, in_thread: bool = False, device_module: Any = None) -> None:
        self.device = device
        self.slot: Slot | None = None
        self._streams = device_module or torch.get_device_module(device)
        self._load_stream = self._streams.Stream(device=device)
        self._save_stream = self._streams.Stream(device=device)
        self._thread: ThreadPoolExecutor | None = None
        self._staging: Staging | None = None
        self._under_way: dict[Any, deque[_Copy]] = {self._load_stream: deque(), self._save_stream: deque()}
        self._process = os.getpid()
        weakref.finalize(self, _finish, [*self._under_way.values()], self._process)
        self.exposure = Exposure()
        if in_thread:
            self.copy_in_thread()

    def copy_in_thread(self) -> None:
        """From now on, copy in a thread."""
        if self._thread is None:
            self._staging = make_staging(self.device)
            self._thread = ThreadPoolExecutor(1, "hift-copies")

    def save(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copy each (device, host) pair to the host. Returns the event that ends it; ``None``: there are no pairs."""
        return self._run(self._save_stream, pairs, [host for _, host in pairs], [device for device, _ in pairs])

    def load(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any = None) -> Any:
        """Copy each (host, device) pair to the device, after the event ``after``. Returns the event that ends it."""
        return self._run(self._load_stream, pairs, [host for host, _ in pairs], [device for _, device in pairs], after)

    def wait(self, event: Any) -> None:
        """Let the compute stream wait for ``event``; ``None`` has happened."""
        if event is not None:
            compute = self._streams.current_stream(self.device)
            begin = self._now(compute)
            compute.wait_event(_event(event))  # Note [Streams] 4, 5
            self.exposure.add(begin, self._now(compute))
            for copy in chain(*self._under_way.values()):
                if copy.end is event:
                    copy.device.clear()

    def finish(self) -> None:
        """Let the host wait until no copy is under way."""
        _finish(self._under_way.values(), self._process)

    def _now(self, stream: Any) -> Any:
        event = self._streams.Event(enable_timing=True)
        event.record(stream)
        return event

    def _run(
        self,
        stream: Any,
        pairs: Sequence[tuple[Tensor, Tensor]],
        host: list[Tensor],
        device: list[Tensor],
        after: Any = None,
    ) -> Any:
        if not pairs:
            return None
        self._let_go()
        begin = self._streams.current_stream(self.device).record_event()
        work = partial(self._copy, stream, pairs, begin, after, self.slot)
        end = work() if self._thread is None else self._thread.submit(work)
        outside = [tensor for tensor in device if self.slot is None or self.slot.range_of(tensor) is None]
        self._under_way[stream].append(_Copy(end, host, outside))
        return end

    def _copy(
        self, stream: Any, pairs: Sequence[tuple[Tensor, Tensor]], begin: Any, after: Any, slot: Slot | None
    ) -> Any:
        with self._streams.stream(stream):
            stream.wait_event(begin)  # Note [Streams] 1
            if after is not None:
                stream.wait_event(_event(after))  # Note [Streams] 3
            for source, target in chain.from_iterable(_chunks(*pair) for pair in pairs):
                if slot is not None and (free := slot.free_after(target)) is not None:
                    stream.wait_event(free)  # Note [Streams] 2
                if self._staging is None or source.dim() != 1:
                    target.copy_(source, non_blocking=True)
                else:
                    self._staging.copy(source, target, stream)
                if slot is not None and slot.range_of(source) is not None:
                    slot.note_read(source, stream.record_event())
            return stream.record_event()

    def _let_go(self) -> None:
        """Forget copies that are over, and whose end was waited for if their memory on the device may be freed.

        But not the last one: to have waited for it is to have waited for all.
        """
        for copies in self._under_way.values():
            while len(copies) > 1 and not copies[0].device and _has_happened(copies[0].end):
                copies.popleft()


class InPlace:
    """Stands in for ``Transfers`` where host and device are the same memory: nobody has to wait for a copy."""

    slot: Slot | None = None

    def __init__(self) -> None:
        self.exposure = Exposure()

    def save(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy what is not at its place yet: (new, place) pairs."""
        for new, place in pairs:
            place.copy_(new)

    def load(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any = None) -> None:
        """Nothing to do: all is at its place."""

    def wait(self, event: Any) -> None:
        """Nothing to do."""

    def finish(self) -> None:
        """Nothing to do."""

    def copy_in_thread(self) -> None:
        """Nothing to do."""


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
    if source.dim() != 1 or not (source.is_contiguous() and target.is_contiguous()):
        return iter([(source, target)])
    size = max(1, _CHUNK // source.element_size())
    return zip(torch.split(source, size), torch.split(target, size), strict=True)
