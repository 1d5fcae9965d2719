"""Where the optimizer state of each parameter lives: on the device while its group is stepped, elsewhere otherwise.

Where host and device are the same memory (training on a CPU) tensors are handed over without being copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from lightning_hift.host_memory import HostMemory, can_page_lock
from lightning_hift.state_tree import FlatState, State, count_bytes, flatten_state
from lightning_hift.transfers import DeviceSlot, Transfers, slot_bytes

Offload = Literal["host", "disk", "none"]
Owner = nn.Parameter  # a parameter, or a slice of one


@dataclass
class _Place:
    """A tensor's place on the host. ``moves`` is false for what stays there during the step, such as step counters."""

    host: Tensor
    moves: bool


class _Kept(NamedTuple):
    places: dict[tuple[Any, int], _Place]  # by the labels of FlatState
    rebuild: Callable[[list[Tensor]], State]

    def moving(self) -> list[Tensor]:
        return [place.host for place in self.places.values() if place.moves]


class _InFlight(NamedTuple):
    """Device tensors that are being copied, with the event that ends it."""

    states: dict[Owner, State]
    event: Any


class StateOffloader:
    """Holds the optimizer state of all parameters of one optimizer and hands over that of the active ones.

    Args:
        device: Where the parameters live while they are stepped.
        offload: ``"host"`` keeps the state of inactive parameters in host memory, ``"disk"`` in memory-mapped files;
            ``"none"`` leaves it on the device.
        prefetch: Fetch the next group's state while the batch before it is still computing. Without it each step waits
            for its copies both ways, but the state is not on the device beside the activations.
        pin_memory: Use page-locked host memory, without which copies are slow. Ignored on a CPU and on disk.
        directory: For ``"disk"``: where to put the files. They are deleted by ``remove_files``, or with this object.
        device_module: Streams and events; default ``torch.get_device_module(device)``.
        always_copy: Copy even where host and device are the same memory. Only useful in tests.

    Raises:
        ValueError: ``offload`` is unknown, or does not go with ``directory``.
        OSError: ``directory`` does not exist or cannot be written to.
    """

    def __init__(
        self,
        device: torch.device | str,
        offload: Offload = "host",
        prefetch: bool = True,
        pin_memory: bool = True,
        directory: str | os.PathLike[str] | None = None,
        device_module: Any = None,
        always_copy: bool = False,
    ) -> None:
        check_offload(offload, directory)
        self.device = torch.device(device)
        self.offload = offload
        self.prefetch = prefetch
        pinned = pin_memory and can_page_lock(self.device)
        self._memory = HostMemory(self.device if pinned else None, directory)
        self._transfers: Transfers | None = None
        # Without streams (Apple's GPUs) host and device share their memory anyway.
        if (always_copy or self.device.type != "cpu") and hasattr(
            device_module or torch.get_device_module(self.device), "Stream"
        ):
            host_takes_part = offload == "disk" or (can_page_lock(self.device) and not pinned)
            self._transfers = Transfers(self.device, host_takes_part, device_module)
        self._store: dict[Owner, _Kept] = {}
        self._resident: dict[Owner, State] = {}  # on the device, newer than the store
        self._incoming = _InFlight({}, None)  # on the device, equal to the store
        self._outgoing = _InFlight({}, None)
        self._always: frozenset[Owner] = frozenset()
        self._in_slot: set[Owner] = set()
        self._largest_turn = 0  # bytes of the largest set of owners that has come and gone

    # --- what there is ------------------------------------------------------------------------------------------------

    @property
    def device_bytes(self) -> int:
        """Bytes of optimizer state on the device: the slot, and what lies outside it.

        Where nothing is copied, it is what would be there.
        """
        if self._transfers is None:
            return sum(count_bytes(state) for state in (self._resident | self._incoming.states).values())
        slot = self._transfers.slot
        on_host = {
            place.host.untyped_storage().data_ptr() for each in self._store.values() for place in each.places.values()
        }
        sizes = {} if slot is None else {slot.memory.data_ptr(): slot.nbytes}
        for place in (self._resident, self._incoming.states, self._outgoing.states):
            for tensor in (t for state in place.values() for t in flatten_state(state).tensors):
                storage = tensor.untyped_storage()
                if tensor.device.type == self.device.type and storage.data_ptr() not in on_host:
                    sizes[storage.data_ptr()] = storage.nbytes()
        return sum(sizes.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of optimizer state that have a place in host memory, or on disk."""
        return sum(
            place.host.numel() * place.host.element_size()
            for kept in self._store.values()
            for place in kept.places.values()
        )

    def end_step(self) -> None:
        """What is waited for from now on belongs to the next step."""
        if self._transfers is not None:
            self._transfers.end_step()

    def exposed_ms(self) -> float:
        """Milliseconds for which the last known step had to wait for state. Does not wait for the device."""
        return 0.0 if self._transfers is None else self._transfers.exposed_ms()

    def state_of(self, owner: Owner) -> State:
        """Current state of ``owner`` without copying it. Call ``drain`` first."""
        if owner in self._resident and owner not in self._in_slot:
            return self._resident[owner]
        kept = self._store.get(owner)
        return {} if kept is None else kept.rebuild([place.host for place in kept.places.values()])

    # --- the course of a step -----------------------------------------------------------------------------------------

    def put(self, states: Mapping[Owner, State], stays_on_host: Collection[Any] = ()) -> None:
        """Take over ``states`` (from a checkpoint or an optimizer's constructor) by copying them to the host.

        Args:
            states: For each owner, tensors and plain values, nested or not, on any device. Dtypes are kept.
            stays_on_host: Keys of tensors that are never moved to the device.

        Raises:
            OSError: The disk is full.
        """
        if self._transfers is not None:
            self._transfers.finish()
        flat = {owner: flatten_state(state) for owner, state in states.items()}
        kept = self._make_places(flat, arriving=True, stays_on_host=stays_on_host)
        for owner, (tensors, labels, _) in flat.items():
            for label, tensor in zip(labels, tensors, strict=True):
                place = kept[owner].places[label]
                if place.host.data_ptr() != tensor.data_ptr():
                    place.host.copy_(tensor)
                    place.moves = label[0] not in stays_on_host
            self._resident.pop(owner, None)
            self._in_slot.discard(owner)
        self._store |= kept

    def forget(self, keep: Collection[Owner]) -> None:
        """Forget what is on the device, and all state but that of ``keep``, whose places may be used again."""
        self.drain()
        self._drop_incoming()
        self._resident.clear()
        self._in_slot.clear()
        self._store = {owner: kept for owner, kept in self._store.items() if owner in keep}

    def drop(self, owners: Collection[Owner], keep: Collection[Any] = ()) -> None:
        """Forget the state of ``owners``, on the host and on the device, but for what is under the keys ``keep``."""
        if not self._incoming.states.keys().isdisjoint(owners):
            self._drop_incoming()
        self._finish_copies_of(owners)
        for owner in owners:
            if owner in self._store:
                kept = _without(self._store[owner], keep)
                self._store |= {owner: kept} if kept.places else {}
                if not kept.places:
                    del self._store[owner]
            if owner in self._resident:
                self._resident[owner] = {key: v for key, v in self._resident[owner].items() if key in keep}
                if not self._resident[owner]:
                    del self._resident[owner]
                    self._in_slot.discard(owner)

    def clear(self) -> None:
        """Forget all state."""
        self.forget(keep=())

    def hold(self, owners: Iterable[Owner], always: Iterable[Owner] = ()) -> None:
        """Make ``owners`` those whose state is on the device: release what leaves, fetch what arrives.

        Args:
            owners: What will be stepped next.
            always: What is to stay on the device from now on.

        Raises:
            OSError: The disk is full. The state that should have gone there still is on the device.
        """
        self._always = frozenset(always)
        staying = [*owners, *self._always]
        if self.offload != "none":
            self._release([owner for owner in self._resident if owner not in set(staying)])
        if not set(staying).issuperset(self._incoming.states):
            self._drop_incoming()
        if not self.prefetch:
            self._settle()
            if self._transfers is not None and not self._in_slot:
                self._transfers.slot = None
            return
        arriving = [] if self._incoming.states else self._missing(staying)
        # A larger slot must wait until what is leaving has left, or there would be two of them for a while.
        if arriving and not (self._outgoing.states and self._must_grow(arriving)):
            self._fetch(arriving)

    def take(self, owners: Iterable[Owner]) -> dict[Owner, State]:
        """States of ``owners`` on the device, ready for the step. Owners without state yet are left out."""
        owners = list(owners)
        measured = nullcontext() if self._transfers is None else self._transfers.measure_exposed()
        with record_function("HiFT::wait_for_state"), measured:
            self._settle()  # the step may need the memory for state that it makes
            self._receive()
            if late := self._missing(owners):
                self._fetch(late)
                self._receive()
        return {owner: self._resident[owner] for owner in owners if owner in self._resident}

    def give(self, states: Mapping[Owner, State]) -> None:
        """Take back the states that the step has changed. They stay on the device until ``hold`` lets them go."""
        self._resident |= states

    def release_all(self) -> None:
        """Bring everything to the host and free the device, whatever ``offload`` says.

        What a full disk does not take goes to host memory.
        """
        self._drop_incoming()
        try:
            self._release(list(self._resident))
        except OSError:
            self._memory = HostMemory()
            self._release(list(self._resident))
        self.drain()
        if self._transfers is not None:
            self._transfers.slot = None

    def drain(self) -> None:
        """Block the host until it may read all state; what lies in the slot is copied to the host, too."""
        if self._transfers is not None:
            here = [owner for owner in self._in_slot if owner in self._resident]
            if here:
                self._save(here)
            self._transfers.finish()
        self._settle()

    def remove_files(self) -> None:
        """Delete the files of ``"disk"``. The state stays readable, and its space in use, until this object goes."""
        self._memory.remove_files()

    # --- moves --------------------------------------------------------------------------------------------------------

    def _missing(self, owners: Iterable[Owner]) -> list[Owner]:
        return [o for o in owners if o in self._store and o not in self._resident and o not in self._incoming.states]

    def _fetch(self, owners: list[Owner]) -> None:
        with record_function("HiFT::fetch"):
            kept = {owner: self._store[owner] for owner in owners}
            if self._transfers is None:
                hosts = {owner: [place.host for place in each.places.values()] for owner, each in kept.items()}
                self._incoming = _InFlight({owner: each.rebuild(hosts[owner]) for owner, each in kept.items()}, None)
                return
            # Allocated on the compute stream: there the memory is used and freed.
            device = self._device_memory(kept, self._transfers)
            states = {}
            for owner, each in kept.items():
                arriving = iter(device[owner])
                states[owner] = each.rebuild([next(arriving) if p.moves else p.host for p in each.places.values()])
            pairs = [pair for o, each in kept.items() for pair in zip(each.moving(), device[o], strict=True)]
            written = self._outgoing.event if not self._outgoing.states.keys().isdisjoint(owners) else None
            self._incoming = _InFlight(states, self._transfers.load(pairs, after=written))

    def _device_memory(self, kept: Mapping[Owner, _Kept], transfers: Transfers) -> dict[Owner, list[Tensor]]:
        """Device memory for what moves: in the slot for what comes and goes, outside it for what stays."""
        passing = self._passing(kept)
        like = [tensor for owner in passing for tensor in kept[owner].moving()]
        if transfers.slot is None or self._in_slot or self._must_grow(passing):
            transfers.slot = None
            self._largest_turn = max(self._largest_turn, slot_bytes(like))
            transfers.slot = DeviceSlot(self._largest_turn, self.device)
        self._in_slot = set(passing)
        cut = iter(transfers.slot.cut(like))
        return {
            owner: [
                next(cut) if owner in self._in_slot else torch.empty_like(t, device=self.device) for t in each.moving()
            ]
            for owner, each in kept.items()
        }

    def _passing(self, owners: Iterable[Owner]) -> list[Owner]:
        """Those that come and go."""
        return [owner for owner in owners if self.offload != "none" and owner not in self._always]

    def _must_grow(self, owners: Iterable[Owner]) -> bool:
        wanted = slot_bytes(tensor for owner in self._passing(owners) for tensor in self._store[owner].moving())
        slot = None if self._transfers is None else self._transfers.slot
        return self._transfers is not None and (slot is None or slot.nbytes < wanted)

    def _receive(self) -> None:
        """Make what was fetched part of what is on the device."""
        self._wait(self._incoming.event)
        self._resident |= self._incoming.states
        if self.offload == "none":  # the host has had them for the way only
            self._finish_copies_of(self._incoming.states)
            for owner in self._incoming.states:
                del self._store[owner]
        self._incoming = _InFlight({}, None)

    def _drop_incoming(self) -> None:
        self._wait(self._incoming.event)
        self._in_slot -= self._incoming.states.keys()
        self._incoming = _InFlight({}, None)

    def _release(self, owners: Sequence[Owner]) -> None:
        if not owners:
            return
        with record_function("HiFT::release"):
            self._settle()
            event = self._save(owners)
            passing = [tensor for owner in self._passing(owners) for tensor in self._store[owner].moving()]
            self._largest_turn = max(self._largest_turn, slot_bytes(passing))
            self._in_slot.difference_update(owners)
            self._outgoing = _InFlight({owner: self._resident.pop(owner) for owner in owners}, event)

    def _save(self, owners: Sequence[Owner]) -> Any:
        """Copy state from the device to its places on the host. Returns the event that ends it."""
        flat = {owner: flatten_state(self._resident[owner]) for owner in owners}
        kept = self._make_places(flat)
        self._store |= kept
        if self._transfers is None:
            return None
        both = [both for o in owners for both in zip(flat[o].tensors, kept[o].places.values(), strict=True)]
        return self._transfers.save([(t, place.host) for t, place in both if place.moves])

    def _settle(self) -> None:
        """Let go of the device tensors of the last release."""
        self._wait(self._outgoing.event)
        self._outgoing = _InFlight({}, None)

    def _finish_copies_of(self, owners: Iterable[Owner]) -> None:
        """Let the host wait before it frees what ``owners`` have on the host."""
        if self._transfers is not None and not self._store.keys().isdisjoint(owners):
            self._transfers.finish()

    def _wait(self, event: Any) -> None:
        if self._transfers is not None:
            self._transfers.wait(event)

    # --- places on the host -------------------------------------------------------------------------------------------

    def _make_places(
        self, flat: Mapping[Owner, FlatState], arriving: bool = False, stays_on_host: Collection[Any] = ()
    ) -> dict[Owner, _Kept]:
        """A place for each tensor, the one it had before where that fits. Changes nothing if the disk is full.

        Args:
            flat: State that is on the device, or comes from elsewhere.
            arriving: It comes from elsewhere, and will be copied.
            stays_on_host: See ``put``. It lies apart, so that it does not keep the memory of all the rest.
        """
        found: dict[Owner, dict[tuple[Any, int], _Place | None]] = {}
        homeless: list[tuple[Owner, tuple[Any, int], Tensor]] = []
        for owner, each in flat.items():
            before = self._store[owner].places if owner in self._store else {}
            found[owner] = {}
            for label, tensor in zip(each.labels, each.tensors, strict=True):
                place = self._place_of(tensor, before.get(label), arriving)
                if place is None:
                    homeless.append((owner, label, tensor))
                found[owner][label] = place
        for moves in (True, False):
            alike = [each for each in homeless if (each[1][0] not in stays_on_host) == moves]
            tensors = [tensor for *_, tensor in alike]
            new = self._host_like(tensors) if moves else [torch.empty_like(t, device="cpu") for t in tensors]
            for (owner, label, _), host in zip(alike, new, strict=True):
                found[owner][label] = _Place(host, moves)
        kept = {
            owner: _Kept({label: place for label, place in found[owner].items() if place is not None}, each.rebuild)
            for owner, each in flat.items()
        }
        if self._transfers is None:
            for owner, each in flat.items():
                for tensor, place in zip(each.tensors, kept[owner].places.values(), strict=True):
                    if place.host.data_ptr() != tensor.data_ptr():
                        place.host.copy_(tensor)
        return kept

    def _place_of(self, tensor: Tensor, old: _Place | None, arriving: bool) -> _Place | None:
        """A place that needs no new memory; ``None`` if there is none."""
        fits = old is not None and old.host.shape == tensor.shape and old.host.dtype == tensor.dtype
        if old is not None and fits and old.host.device == tensor.device and old.host.data_ptr() == tensor.data_ptr():
            return old
        if arriving:
            return old if fits else None
        if self._transfers is None:
            return (old if fits else None) if self.offload == "disk" else _Place(tensor, moves=True)
        if tensor.device.type != self.device.type:
            return _Place(tensor, moves=False)
        return old if fits and old is not None and old.moves else None

    def _host_like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host memory with the shapes and dtypes of ``tensors``, and their strides where those leave no gaps."""
        if self._transfers is None and self.device.type != "cpu":
            return [torch.empty_like(tensor, device=self.device) for tensor in tensors]
        flats = self._memory.allocate(tensors)
        strides = [torch.empty_like(tensor, device="meta").stride() for tensor in tensors]
        return [f.as_strided(t.shape, stride) for f, t, stride in zip(flats, tensors, strides, strict=True)]


def _without(kept: _Kept, keep: Collection[Any]) -> _Kept:
    """What is under the keys ``keep``."""
    state = kept.rebuild([place.host for place in kept.places.values()])
    places = {label: place for label, place in kept.places.items() if label[0] in keep}
    return _Kept(places, flatten_state({key: value for key, value in state.items() if key in keep}).rebuild)


def check_offload(offload: str, directory: str | os.PathLike[str] | None = None) -> None:
    """Refuse an unknown tier, or one that does not go with ``directory``.

    Raises:
        ValueError: As said.
    """
    if offload not in get_args(Offload):
        raise ValueError(f"Got offload={offload!r}; choose one of {', '.join(map(repr, get_args(Offload)))}.")
    if (offload == "disk") != (directory is not None):
        raise ValueError(
            f"Got offload={offload!r} with {'no directory' if directory is None else f'the directory {directory}'}."
            " offload='disk' needs a directory for its files (offload_directory of the strategy), on a fast disk; the"
            " others take none."
        )
