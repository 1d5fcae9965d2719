"""Where the optimizer state of each parameter lives, and the copies that move it.

Note [Streams]
    State is needed on the device only while its group is stepped, so it is fetched and released during the rest of the
    batch, on two side streams that run beside the compute stream (the current one) and beside each other:

        compute   ... step(g0) | forward, backward of g1 ............ | step(g1) | ...
        release                |-- g0: device to host --|
        fetch                  |-- g1: host to device --|

    Four waits make this safe. Each is an event, so the host never blocks on the step path:
      1. the fetch stream waits for the compute stream before it writes into memory that the allocator has just handed
         out, because kernels queued earlier may still use that memory;
      2. the fetch stream waits for a release of the same parameter, or it would read a half-written host copy;
      3. the compute stream waits for the fetch before the step, or the step would read a half-written device copy;
      4. the compute stream waits for the last release before its device tensors are freed, or the allocator could hand
         their memory out while it is still being read.
    A host copy may be read by the host (for a checkpoint) only after ``drain``.

Where host and device are the same memory (training on a CPU) the same calls hand tensors over without copying them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.profiler import record_function

Offload = Literal["host", "none"]
State = dict[Any, Any]


@dataclass
class _Slot:
    """A tensor's place on the host. ``moves`` is false for what stays there during the step, such as step counters."""

    host: Tensor
    moves: bool


class _InFlight(NamedTuple):
    """Device tensors that a side stream is writing or reading, with the event that ends it."""

    states: dict[nn.Parameter, State]
    event: Any


class StateOffloader:
    """Holds the optimizer state of all parameters of one optimizer and hands over that of the active ones.

    Args:
        device: Where the parameters live while they are stepped.
        offload: ``"host"`` keeps the state of inactive parameters in host memory; ``"none"`` leaves it on the device.
        prefetch: Fetch the next group's state while the batch before it is still computing. Costs a second group's
            state on the device for that time; without it each step waits for its copy.
        pin_memory: Use page-locked host memory, without which copies block the host. Ignored on a CPU.
        device_module: Streams and events; default ``torch.get_device_module(device)``.
        always_copy: Copy even where host and device are the same memory. Only useful in tests.

    Raises:
        ValueError: ``offload`` is unknown.
    """

    def __init__(
        self,
        device: torch.device | str,
        offload: Offload = "host",
        prefetch: bool = True,
        pin_memory: bool = True,
        device_module: Any = None,
        always_copy: bool = False,
    ) -> None:
        if offload not in get_args(Offload):
            raise ValueError(f"Got offload={offload!r}; choose one of {', '.join(map(repr, get_args(Offload)))}.")
        self.device = torch.device(device)
        self.offload = offload
        self.prefetch = prefetch
        self._copies = always_copy or self.device.type != "cpu"
        self._pin_memory = pin_memory and self.device.type == "cuda"
        self._streams = device_module or torch.get_device_module(self.device)
        # Without streams (Apple's GPUs) host and device share their memory anyway.
        self._copies = self._copies and hasattr(self._streams, "Stream")
        if self._copies:
            self._fetch_stream = self._streams.Stream(device=self.device)
            self._release_stream = self._streams.Stream(device=self.device)
        self._store: dict[nn.Parameter, State] = {}  # leaves are _Slot
        self._resident: dict[nn.Parameter, State] = {}  # on the device, newer than the store
        self._incoming = _InFlight({}, None)  # on the device, equal to the store
        self._outgoing = _InFlight({}, None)
        self._nbytes: dict[nn.Parameter, int] = {}

    @property
    def device_bytes(self) -> int:
        """Bytes of optimizer state on the device: active, being fetched and being released.

        Where nothing is copied, it is what would be there.
        """
        places = (self._resident, self._incoming.states, self._outgoing.states)
        return sum(self._nbytes[p] for place in places for p in place)

    @property
    def host_bytes(self) -> int:
        """Bytes of optimizer state that have a place in host memory."""
        return sum(self._nbytes.get(p, 0) for p in self._store)

    def put(self, parameter: nn.Parameter, state: State, stays_on_host: Collection[Any] = ()) -> None:
        """Take over ``state`` (from a checkpoint or an optimizer's constructor) by copying it to the host.

        Args:
            parameter: The owner of the state.
            state: Tensors and plain values, nested or not, on any device. Dtypes are kept.
            stays_on_host: Keys of tensors that are never moved to the device.
        """
        self._store[parameter] = {
            key: _map_tensors(value, partial(self._host_slot, moves=key not in stays_on_host))
            for key, value in state.items()
        }
        self._nbytes[parameter] = _nbytes(state)

    def clear(self) -> None:
        """Forget all state."""
        self.drain()
        if self._incoming.event is not None:
            self._incoming.event.synchronize()
        self._incoming = _InFlight({}, None)
        self._store.clear()
        self._resident.clear()

    def hold(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make ``parameters`` those whose state is on the device: release what leaves, fetch what arrives."""
        staying = set(parameters)
        leaving = [] if self.offload == "none" else [p for p in self._resident if p not in staying]
        if leaving:
            self._release(leaving)
        if not staying.issuperset(self._incoming.states):
            self._wait_incoming()
            self._incoming = _InFlight({}, None)
        arriving = [
            p for p in staying if p in self._store and p not in self._resident and p not in self._incoming.states
        ]
        if arriving and self.prefetch and not self._incoming.states:
            self._fetch(arriving)

    def take(self, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, State]:
        """States of ``parameters`` on the device, ready for the step. Parameters without state yet are left out."""
        parameters = list(parameters)
        with record_function("HiFT::wait_for_state"):
            self._receive()
            late = [p for p in parameters if p in self._store and p not in self._resident]
            if late:
                self._fetch(late)
                self._receive()
        return {p: self._resident[p] for p in parameters if p in self._resident}

    def give(self, states: dict[nn.Parameter, State]) -> None:
        """Take back the states that the step has changed. They stay on the device until ``hold`` lets them go."""
        for parameter, state in states.items():
            self._resident[parameter] = state
            self._nbytes[parameter] = _nbytes(state)

    def release_all(self) -> None:
        """Bring everything to the host and free the device, whatever ``offload`` says."""
        self._wait_incoming()
        self._incoming = _InFlight({}, None)
        if self._resident:
            self._release(list(self._resident))
        self.drain()

    def drain(self) -> None:
        """Block the host until the copies to it have finished, so that it may read them."""
        if self._outgoing.event is not None:
            self._outgoing.event.synchronize()
        self._settle()

    def state_of(self, parameter: nn.Parameter) -> State:
        """Current state of ``parameter`` without copying it. Call ``drain`` first."""
        if parameter in self._resident:
            return self._resident[parameter]
        return {k: _map_slots(v, lambda slot: slot.host) for k, v in self._store.get(parameter, {}).items()}

    # --- copies -------------------------------------------------------------------------------------------------------

    def _fetch(self, parameters: list[nn.Parameter]) -> None:
        with record_function("HiFT::fetch"):
            # Allocated on the compute stream: there the memory is used and freed.
            states = {p: {k: _map_slots(v, self._device_place) for k, v in self._store[p].items()} for p in parameters}
            if not self._copies:
                self._incoming = _InFlight(states, None)
                return
            allocated = self._streams.current_stream(self.device).record_event()
            with self._streams.stream(self._fetch_stream):
                self._fetch_stream.wait_event(allocated)  # Note [Streams] 1
                if not self._outgoing.states.keys().isdisjoint(parameters):
                    self._fetch_stream.wait_event(self._outgoing.event)  # Note [Streams] 2
                for p in parameters:
                    for key, value in self._store[p].items():
                        _zip_slots(value, states[p][key], _copy_to_device)
                self._incoming = _InFlight(states, self._fetch_stream.record_event())

    def _receive(self) -> None:
        """Make what was fetched part of what is on the device."""
        self._wait_incoming()
        self._resident |= self._incoming.states
        self._incoming = _InFlight({}, None)

    def _wait_incoming(self) -> None:
        if self._incoming.event is not None:
            self._streams.current_stream(self.device).wait_event(self._incoming.event)  # Note [Streams] 3

    def _release(self, parameters: list[nn.Parameter]) -> None:
        with record_function("HiFT::release"):
            self._settle()
            states = {p: self._resident.pop(p) for p in parameters}
            for p in parameters:
                old = self._store.get(p, {})
                self._store[p] = {k: self._host_place(v, old.get(k)) for k, v in states[p].items()}
            self._outgoing = _InFlight(states, None)
            if not self._copies:
                return
            stepped = self._streams.current_stream(self.device).record_event()
            with self._streams.stream(self._release_stream):
                self._release_stream.wait_event(stepped)  # the step itself must have finished
                for p in parameters:
                    for key, value in self._store[p].items():
                        _zip_slots(value, states[p][key], _copy_to_host)
                self._outgoing = _InFlight(states, self._release_stream.record_event())

    def _settle(self) -> None:
        """Let go of the device tensors of the last release."""
        if self._outgoing.event is not None:
            self._streams.current_stream(self.device).wait_event(self._outgoing.event)  # Note [Streams] 4
        self._outgoing = _InFlight({}, None)

    # --- places -------------------------------------------------------------------------------------------------------

    def _device_place(self, slot: _Slot) -> Tensor:
        if not (self._copies and slot.moves):
            return slot.host
        return torch.empty_like(slot.host, device=self.device)

    def _host_place(self, value: Any, old: Any) -> Any:
        """A host slot for each tensor of ``value``: the one it had before where the shape still fits."""
        if isinstance(value, Tensor):
            stayed = isinstance(old, _Slot) and old.host is value
            if stayed or not self._copies or value.device.type != self.device.type:
                return _Slot(value, moves=False)
            if isinstance(old, _Slot) and old.host.shape == value.shape and old.host.dtype == value.dtype:
                return _Slot(old.host, moves=True)
            return _Slot(self._host_empty(value), moves=True)
        if isinstance(value, dict):
            return {k: self._host_place(v, old.get(k) if isinstance(old, dict) else None) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            before = old if isinstance(old, (list, tuple)) and len(old) == len(value) else [None] * len(value)
            return _rebuilt(value, [self._host_place(v, o) for v, o in zip(value, before, strict=True)])
        return value

    def _host_empty(self, like: Tensor) -> Tensor:
        if self._pin_memory:
            try:
                return torch.empty_like(like, device="cpu", pin_memory=True)
            except RuntimeError as error:
                self._pin_memory = False
                warnings.warn(
                    f"Page-locked host memory was refused ({error}); optimizer state goes to pageable memory, which is"
                    " slower. Raise the limit (ulimit -l), or pass pin_memory=False to silence this.",
                    stacklevel=2,
                )
        return torch.empty_like(like, device="cpu")

    def _host_slot(self, tensor: Tensor, moves: bool) -> _Slot:
        return _Slot(self._host_empty(tensor).copy_(tensor.detach()), moves)


def _copy_to_device(slot: _Slot, device_tensor: Tensor) -> None:
    if slot.moves:
        device_tensor.copy_(slot.host, non_blocking=True)


def _copy_to_host(slot: _Slot, device_tensor: Tensor) -> None:
    if slot.moves:
        slot.host.copy_(device_tensor, non_blocking=True)


def _map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    return _map(value, Tensor, change)


def _map_slots(value: Any, change: Callable[[_Slot], Any]) -> Any:
    return _map(value, _Slot, change)


def _map(value: Any, leaf: type, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to every ``leaf`` inside its dicts, lists and tuples."""
    if isinstance(value, leaf):
        return change(value)
    if isinstance(value, dict):
        return {k: _map(v, leaf, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return _rebuilt(value, [_map(v, leaf, change) for v in value])
    return value


def _rebuilt(value: Any, items: list[Any]) -> Any:
    """``items`` in a list or tuple of the same class as ``value``."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _zip_slots(slots: Any, values: Any, act: Callable[[_Slot, Tensor], None]) -> None:
    if isinstance(slots, _Slot):
        act(slots, values)
    elif isinstance(slots, dict):
        for key, slot in slots.items():
            _zip_slots(slot, values[key], act)
    elif isinstance(slots, (list, tuple)):
        for slot, value in zip(slots, values, strict=True):
            _zip_slots(slot, value, act)


def _nbytes(value: Any) -> int:
    total = 0

    def add(tensor: Tensor) -> None:
        nonlocal total
        total += tensor.numel() * tensor.element_size()

    _map_tensors(value, add)
    return total
