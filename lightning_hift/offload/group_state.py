"""Optimizer state of parameters that are stepped together: one flat layout, the same on the host and on the device.

State is laid out by dtype: all tensors of one dtype lie side by side in one flat tensor, so that a group moves in a few
copies. Masters lie apart from the optimizer's own state, because they are there before its first step and outlive a
reset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_hift.offload.state_tree import State, flatten_state
from lightning_hift.precision.master_weights import MASTER_KEYS

Owner = nn.Parameter  # a parameter, or the stand-in of a slice of one
FlatKey = tuple[bool, torch.dtype]  # whether these are masters, and of what dtype
ALIGNMENT = 64
"""Bytes at whose multiples a flat tensor begins in a slot."""
_CONSTANTS = (int, float, bool, str, bytes, type(None))


class Label(NamedTuple):
    """Where a tensor belongs: whose state, under which key of it, and a number among the tensors of that key."""

    owner: Owner
    key: Any
    number: int


class Contents:
    """The state of some owners and its tensors.

    Args:
        states: For each owner, tensors and plain values, nested or not.
        stays_on_host: Which tensors never move, such as step counters.
    """

    def __init__(self, states: Mapping[Owner, State], stays_on_host: Callable[[Label, Tensor], bool]) -> None:
        self.states = {owner: state for owner, state in states.items() if state}
        self.tensors: dict[Label, Tensor] = {}
        self._builders: dict[Owner, tuple[list[Label], Callable[[list[Tensor]], State]]] = {}
        for owner, state in self.states.items():
            tensors, labels, build = flatten_state(state)
            named = [Label(owner, *label) for label in labels]
            self.tensors |= zip(named, tensors, strict=True)
            self._builders[owner] = named, build
        self.on_host = {label: tensor for label, tensor in self.tensors.items() if stays_on_host(label, tensor)}
        self._note()

    def _note(self) -> None:
        self._forms = {owner: {key: _form(v) for key, v in state.items()} for owner, state in self.states.items()}
        self.nbytes = sum(tensor.nbytes for label, tensor in self.tensors.items() if label not in self.on_host)
        """Of the tensors that move."""

    def is_same(self, states: Mapping[Owner, State]) -> bool:
        """Whether ``states`` are these, with the same tensors in them, whatever their values are."""
        return len(states) == len(self._forms) and all(
            forms.keys() == (state := states.get(owner, {})).keys()
            and all(form is not None and form == _form(state[key]) for key, form in forms.items())
            for owner, forms in self._forms.items()
        )

    def moved(self, tensors: Mapping[Label, Tensor]) -> Contents:
        """The same with other tensors in the place of those that move."""
        twin = object.__new__(Contents)
        twin.on_host, twin._builders = self.on_host, self._builders
        twin.tensors = {label: tensors.get(label, tensor) for label, tensor in self.tensors.items()}
        twin.states = {
            owner: build([twin.tensors[label] for label in labels]) for owner, (labels, build) in self._builders.items()
        }
        twin._note()
        return twin


def _form(value: Any) -> tuple[Any, ...] | None:
    """What is the same as long as a value is; ``None`` if it has to be taken apart to see that."""
    if type(value) is Tensor:
        return id(value), value.data_ptr(), value.shape
    return (type(value), value) if isinstance(value, _CONSTANTS) else None


class Place(NamedTuple):
    """Where a dense tensor lies in a flat one, in elements from its start."""

    start: int
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(eq=False)
class Flat:
    """Tensors of one dtype side by side.

    Args:
        dtype: Theirs.
        numel: Elements.
        places: Where each lies.
        host: The flat tensor on the host, shape (numel,).
        device: Its copy on the device, if there is one.
    """

    dtype: torch.dtype
    numel: int = 0
    places: dict[Label, Place] = field(default_factory=dict)
    host: Tensor | None = None
    device: Tensor | None = None

    def put(self, label: Label, tensor: Tensor) -> None:
        """Find a place for a tensor like ``tensor``, which may have gaps."""
        self.places[label] = Place(self.numel, tensor.shape, torch.empty_like(tensor, device="meta").stride())
        self.numel += tensor.numel()

    def views(self, memory: Tensor | None) -> dict[Label, Tensor]:
        """All tensors in ``memory``, which is ``host`` or ``device``."""
        assert memory is not None
        return {k: memory[p.start :].as_strided(p.shape, p.stride) for k, p in self.places.items()}

    def holds(self, tensors: Mapping[Label, Tensor]) -> bool:
        """Whether ``tensors`` lie at their places on the device."""
        return self.device is not None and all(
            tensors[label].data_ptr() == self.device.data_ptr() + place.start * self.dtype.itemsize
            and tensors[label].stride() == place.stride
            for label, place in self.places.items()
        )


class GroupState:
    """The state of a few owners that come and go together.

    Args:
        owners: Whose state it is.
        stays: Whether it stays on the device.
    """

    def __init__(self, owners: Iterable[Owner], stays: bool = False) -> None:
        self.owners = list(owners)
        self.stays = stays
        self.flats: dict[FlatKey, Flat] = {}
        self.contents = Contents({}, lambda label, tensor: False)
        """On the device, if they are there or on their way, else on the host."""
        self.is_resident = False
        """Whether they are on the device, and perhaps newer there."""
        self.arriving: Any = None
        """The end of the copy to the device that is under way."""
        self.saved: Any = None
        """The end of the last copy to the host."""
        self.was_released = False
        """Whether it has left the device before."""
        self.is_laid_out = True
        """Whether ``flats`` are those of ``contents``."""
        self._on_host: Contents | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the flat tensors, one after another."""
        return sum(-(-flat.numel * flat.dtype.itemsize // ALIGNMENT) * ALIGNMENT for flat in self.flats.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of what lies on the host."""
        flats = [flat.host for flat in self.flats.values() if flat.host is not None]
        return sum(t.nbytes for t in (*flats, *(() if self.stays else self.contents.on_host.values())))

    def change(self, contents: Contents, flats: dict[FlatKey, Flat] | None = None) -> None:
        """Take over contents of another structure, and the flats that they lie in, if they have some already."""
        self.contents, self.is_laid_out, self._on_host = contents, flats is not None, None
        if flats is not None:
            self.flats = flats

    def lay_out(self, contents: Contents) -> dict[FlatKey, Flat]:
        """Find a place for each tensor of ``contents`` that moves: the old one in flats that stay as they are."""
        new: dict[FlatKey, Flat] = {}
        # Multiples of 16 bytes first, so that all of them are aligned although there are no gaps.
        for label, tensor in sorted(contents.tensors.items(), key=lambda item: item[1].nbytes % 16 != 0):
            if label not in contents.on_host:
                key = (label.key in MASTER_KEYS, tensor.dtype)
                new.setdefault(key, Flat(tensor.dtype)).put(label, tensor)
        return {
            key: old if (old := self.flats.get(key)) is not None and old.places == flat.places else flat
            for key, flat in new.items()
        }

    def viewed(self, on_device: bool) -> Contents:
        """The contents as they lie in the flats, on the device or on the host."""
        if not on_device and self._on_host is not None:
            return self._on_host
        contents = self.contents.moved(
            {k: v for f in self.flats.values() for k, v in f.views(f.device if on_device else f.host).items()}
        )
        if not on_device:
            self._on_host = contents
        return contents

    def leave_host(self) -> None:
        """Let go of the memory on the host."""
        self._on_host = None
        for flat in self.flats.values():
            flat.host = None
