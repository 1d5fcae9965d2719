"""Where the optimizer state of each group lives: on the device while the group is stepped, elsewhere otherwise.

Where host and device are the same memory (training on a CPU), state has its place there and is not copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.profiler import record_function

from lightning_hift.offload.exposure import Exposure
from lightning_hift.offload.group_state import Contents, Flat, FlatKey, GroupState, Owner
from lightning_hift.offload.host_memory import HostMemory, can_page_lock
from lightning_hift.offload.state_tree import State
from lightning_hift.offload.transfers import InPlace, Slot, Transfers
from lightning_hift.precision.master_weights import MASTER_KEYS

Offload = Literal["host", "disk", "none"]


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
        show_progress: Is told, while host memory is page-locked, how many bytes are, and how many will be.

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
        show_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        check_offload(offload, directory)
        self.device = torch.device(device)
        self.offload = offload
        self.prefetch = prefetch
        pinned = pin_memory and can_page_lock(self.device)
        self._memory = HostMemory(self.device if pinned else None, directory)
        self._show_progress = show_progress
        # Without streams (Apple's GPUs) host and device share their memory anyway.
        has_streams = hasattr(device_module or torch.get_device_module(self.device), "Stream")
        self._copies = has_streams and (always_copy or self.device.type != "cpu")
        host_takes_part = offload == "disk" or (can_page_lock(self.device) and not pinned)
        self._transfers = Transfers(self.device, host_takes_part, device_module) if self._copies else InPlace()
        self._groups: list[GroupState] = []
        self._group_of: dict[Owner, GroupState] = {}
        self._in_slot: GroupState | None = None
        self._leaving: list[tuple[Any, int]] = []  # ends of copies from memory that is freed then, and its bytes
        self._left_slot: Any = None  # end of the last copy from the slot

    def add(self, owners: Iterable[Owner], stays: bool = False) -> GroupState:
        """Keep the state of ``owners``, which are stepped together, from now on.

        Args:
            owners: Parameters, or stand-ins for slices of them.
            stays: Leave their state on the device.
        """
        group = GroupState(owners, stays or self.offload == "none")
        self._groups.append(group)
        self._group_of |= dict.fromkeys(group.owners, group)
        return group

    @property
    def reserves(self) -> bool:
        """Whether it takes time to get host memory, so that it had better be done before the first step."""
        return self.offload == "host" and self._memory.is_page_locked

    def reserve(self, sizes: Sequence[int]) -> None:
        """Page-lock host memory before it is needed, which takes about a second for 3 GB.

        Args:
            sizes: Bytes of each group that will be kept there.
        """
        for i, size in enumerate(sizes):
            self._memory.reserve(size)
            self._show_progress(sum(sizes[: i + 1]), sum(sizes))
        self._look_at_memory()

    # --- what there is ------------------------------------------------------------------------------------------------

    @property
    def device_bytes(self) -> int:
        """Bytes of optimizer state on the device: the slot, and what lies outside it.

        Where nothing is copied, it is what would be there.
        """
        slot = 0 if self._transfers.slot is None else self._transfers.slot.nbytes
        outside = [g for g in self._groups if g is not self._in_slot and (g.is_resident or g.arriving is not None)]
        return slot + sum(group.contents.nbytes for group in outside) + sum(nbytes for _, nbytes in self._leaving)

    @property
    def host_bytes(self) -> int:
        """Bytes of optimizer state that have a place in host memory, or on disk."""
        return sum(group.host_bytes for group in self._groups)

    def end_step(self, ends_sweep: bool = False) -> None:
        """What is waited for from now on belongs to the next step, and perhaps to the next sweep."""
        self._transfers.exposure.end_step(ends_sweep)

    def exposed_ms(self) -> float:
        """Milliseconds for which the device had to wait for copies in the last step for which that is known."""
        return self.exposure.step_ms

    @property
    def exposure(self) -> Exposure:
        """How long the device had to wait for copies, by step and sweep. Nobody waits to find out."""
        return self._transfers.exposure.update()

    def state_of(self, owner: Owner) -> State:
        """Current state of ``owner`` without copying it. Call ``drain`` first."""
        group = self._group_of.get(owner)
        return {} if group is None else self._readable(group).states.get(owner, {})

    # --- the course of a step -----------------------------------------------------------------------------------------

    def put(self, states: Mapping[Owner, State], stays_on_host: Mapping[Owner, Collection[Any]] | None = None) -> None:
        """Take over ``states`` (from a checkpoint or an optimizer's constructor) by copying them to the host.

        They replace what their owners have had. Other owners keep their state.

        Args:
            states: For each owner, tensors and plain values, nested or not, on any device. Dtypes are kept.
            stays_on_host: For each owner, keys of tensors that are never moved to the device.

        Raises:
            OSError: The disk is full.
        """
        self.drain()
        stays = stays_on_host or {}
        for group in dict.fromkeys(self._group_of[owner] for owner in states):
            before = group.contents.on_host
            contents = Contents(
                {**self._readable(group).states, **{o: states[o] for o in group.owners if o in states}},
                lambda k, _: k.key in stays.get(k.owner, ()) if k.owner in states else k in before,  # noqa: B023
            )
            flats = group.lay_out(contents)
            self._allocate(flats)
            self._let_go(group)
            views = {label: view for flat in flats.values() for label, view in flat.views(flat.host).items()}
            # What stays lies apart, so that it does not keep the memory of all the rest.
            views |= {label: torch.empty_like(tensor, device="cpu") for label, tensor in contents.on_host.items()}
            for label, view in views.items():
                if view.data_ptr() != contents.tensors[label].data_ptr():
                    view.copy_(contents.tensors[label])
            group.change(contents.moved(views), flats)

    def drop(self, group: GroupState) -> None:
        """Forget the optimizer's own state of ``group``, but not its masters."""
        self._drop_arriving([group])
        before = group.contents
        self._before_freeing(flat for (is_master, _), flat in group.flats.items() if not is_master)
        masters = {o: {k: v for k, v in state.items() if k in MASTER_KEYS} for o, state in before.states.items()}
        flats = {key: flat for key, flat in group.flats.items() if key[0]}
        group.change(Contents(masters, lambda label, _: label in before.on_host), flats)

    def clear(self) -> None:
        """Forget all state, and whose it was."""
        self.drain()
        for group in self._groups:
            self._let_go(group)
        self._groups, self._group_of = [], {}

    def hold(self, group: GroupState | None) -> None:
        """Make ``group`` the one whose state is on the device, beside what stays: release others, and fetch it.

        Args:
            group: What will be stepped next; ``None``: nothing.

        Raises:
            OSError: The disk is full. The state that should have gone there still is on the device.
        """
        going = [each for each in self._groups if each is not group and not each.stays]
        self._release([each for each in going if each.is_resident])
        self._drop_arriving(going)
        if not self.prefetch:
            self._settle()
            if self._in_slot is None:
                self._transfers.slot = None
            return
        for each in [each for each in self._groups if each is group or each.stays]:
            # A larger slot must wait until what is leaving has left, or there would be two of them for a while.
            if self._is_away(each) and not (self._leaving and self._must_grow(each)):
                self._fetch(each)

    def take(self, groups: Iterable[GroupState]) -> dict[Owner, State]:
        """States of ``groups`` on the device, ready for the step. Owners without state yet are left out."""
        taken: dict[Owner, State] = {}
        with record_function("HiFT::wait_for_state"):
            self._settle()  # the step may need the memory for state that it makes
            for group in groups:
                if self._is_away(group):
                    self._fetch(group)
                self._transfers.wait(group.arriving)
                group.arriving, group.is_resident = None, True
                if self.offload == "none" and self._copies and group.host_bytes:
                    self._transfers.finish()  # once after state was loaded: the host has had it for the way only
                    group.leave_host()
                taken |= group.contents.states
        return taken

    def give(self, group: GroupState, states: Mapping[Owner, State]) -> None:
        """Take back the states that the step has changed. They stay on the device until ``hold`` lets them go."""
        group.is_resident = True
        if not group.contents.is_same(states):
            group.change(Contents(states, lambda _, tensor: tensor.device.type != self.device.type))

    def release_all(self) -> None:
        """Bring everything to the host and free the device, whatever ``offload`` says.

        What a full disk does not take goes to host memory.
        """
        self._drop_arriving(self._groups)
        try:
            self._release([group for group in self._groups if group.is_resident])
        except OSError:
            self._memory = HostMemory()
            self._release([group for group in self._groups if group.is_resident])
        self.drain()
        self._transfers.slot = None

    def drain(self) -> None:
        """Block the host until it may read all state; what lies in the slot is copied to the host, too."""
        if self._in_slot is not None and self._in_slot.is_resident:
            self._save(self._in_slot)
        self._transfers.finish()
        self._settle()

    def remove_files(self) -> None:
        """Delete the files of ``"disk"``. The state stays readable, and its space in use, until this object goes."""
        self._memory.remove_files()

    # --- moves --------------------------------------------------------------------------------------------------------

    def _readable(self, group: GroupState) -> Contents:
        """Contents that nothing else will overwrite."""
        in_slot = group is self._in_slot or group.arriving is not None
        return group.viewed(on_device=False) if in_slot else group.contents

    def _is_away(self, group: GroupState) -> bool:
        return not group.is_resident and group.arriving is None and bool(group.flats)

    def _fetch(self, group: GroupState) -> None:
        with record_function("HiFT::fetch"):
            # Allocated on the compute stream: there the memory is used and freed.
            self._find_memory(group)
            pairs = [(flat.host, flat.device) for flat in group.flats.values() if flat.numel]
            group.arriving = self._transfers.load(cast(Any, pairs), after=group.saved)
            group.contents = group.viewed(on_device=True)
            group.is_resident = group.arriving is None

    def _find_memory(self, group: GroupState) -> None:
        """In the slot for what comes and goes, outside it for what stays, or has not all of its state yet."""
        flats, transfers = group.flats.values(), self._transfers
        if not self._copies:
            memory = [flat.host for flat in flats]
        elif not self._goes_to_slot(group):
            memory = [torch.empty(flat.numel, dtype=flat.dtype, device=self.device) for flat in flats]
        else:
            if transfers.slot is None or self._must_grow(group):
                transfers.wait(self._left_slot)
                transfers.slot = None
                transfers.slot = Slot(max(each.nbytes for each in self._groups if not each.stays), self.device)
            self._in_slot, memory = group, [*transfers.slot.cut(flats)]
        for flat, where in zip(flats, memory, strict=True):
            flat.device = where

    def _goes_to_slot(self, group: GroupState) -> bool:
        has_all = group.was_released or not all(is_master for is_master, _ in group.flats)
        return not group.stays and has_all and self._in_slot in (None, group)

    def _must_grow(self, group: GroupState) -> bool:
        slot = self._transfers.slot
        return self._copies and self._goes_to_slot(group) and (slot is None or slot.nbytes < group.nbytes)

    def _release(self, groups: Iterable[GroupState]) -> None:
        for group in groups:
            with record_function("HiFT::release"):
                self._save(group)
                if not self.prefetch or self._is_outside(group):
                    self._leaving.append((group.saved, 0 if group is self._in_slot else group.contents.nbytes))
                if self._in_slot is group:
                    self._left_slot = group.saved
                self._leave(group)
                group.was_released = True
        if all(group.was_released or group.stays for group in self._groups if group.owners):
            self._memory.release_reserved()

    def _is_outside(self, group: GroupState) -> bool:
        """Whether some of it lies in memory of the device outside the slot."""
        slot, contents = self._transfers.slot, group.contents
        moving = (tensor for label, tensor in contents.tensors.items() if label not in contents.on_host)
        return self._copies and any(slot is None or slot.range_of(tensor) is None for tensor in moving)

    def _drop_arriving(self, groups: Iterable[GroupState]) -> None:
        for group in groups:
            if group.arriving is not None:
                self._leave(group)

    def _leave(self, group: GroupState) -> None:
        """Let go of what ``group`` has on the device; the host has it, too."""
        self._let_go(group)
        if group.flats:
            group.contents = group.viewed(on_device=False)

    def _let_go(self, group: GroupState) -> None:
        self._transfers.wait(group.arriving)
        group.arriving, group.is_resident = None, False
        for flat in group.flats.values():
            flat.device = None
        if self._in_slot is group:
            self._in_slot = None

    def _save(self, group: GroupState) -> None:
        """Copy state from the device to its places on the host."""
        if not group.is_laid_out or any(flat.host is None for flat in group.flats.values()):
            flats = group.lay_out(group.contents)
            self._allocate(flats)
            self._before_freeing(flat for flat in group.flats.values() if flat not in flats.values())
            group.change(group.contents, flats)
        pairs: list[tuple[Tensor, Tensor]] = []
        for flat in group.flats.values():
            if flat.holds(group.contents.tensors):
                pairs.append((cast(Tensor, flat.device), cast(Tensor, flat.host)))
            else:
                pairs += [(group.contents.tensors[label], view) for label, view in flat.views(flat.host).items()]
        group.saved = self._transfers.save([pair for pair in pairs if pair[0].data_ptr() != pair[1].data_ptr()])

    def _before_freeing(self, flats: Iterable[Flat]) -> None:
        """Let the host wait before it frees memory of its own that may still be copied."""
        if any(flat.host is not None for flat in flats):
            self._transfers.finish()

    def _settle(self) -> None:
        """Let go of what has left from outside the slot."""
        for event, _ in self._leaving:
            self._transfers.wait(event)
        self._leaving = []

    def _allocate(self, flats: Mapping[FlatKey, Flat]) -> None:
        """Host memory for those that have none. If the disk is full, nothing has changed."""
        for flat in flats.values():
            if flat.host is None and not self._copies and self.device.type != "cpu":
                flat.host = torch.empty(flat.numel, dtype=flat.dtype, device=self.device)
            elif flat.host is None:
                (flat.host,) = self._memory.allocate([torch.empty(flat.numel, dtype=flat.dtype, device="meta")])
        self._look_at_memory()

    def _look_at_memory(self) -> None:
        """Page-locking may have been refused."""
        if can_page_lock(self.device) and not self._memory.is_page_locked:
            self._transfers.copy_in_thread()


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
