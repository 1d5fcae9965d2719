"""The state of random numbers, so that a resumed run draws what one that was never interrupted would have drawn."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RandomState(NamedTuple):
    """Of torch on the CPU and on the current GPU, of NumPy's global functions, of ``random``, and of some generators.

    Taking it is cheap; what it holds becomes tensors when it is saved.
    """

    cpu: Tensor
    cuda: Tensor | None  # if this process has a GPU in use
    numpy: Any = None  # if this process has imported it, and not put another bit generator in
    python: Any = None
    generators: tuple[Tensor, ...] = ()

    @classmethod
    def capture(cls, generators: Iterable[torch.Generator] = ()) -> RandomState:
        """The state now, with that of ``generators``."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        return cls(
            torch.get_rng_state(),
            cuda,
            _numpy_state(),
            random.getstate(),
            tuple(generator.get_state() for generator in generators),
        )

    def restore(self, generators: Iterable[torch.Generator] = ()) -> None:
        """Go on from this state; that of a GPU that is not in use is left out."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.set_rng_state(self.cuda)
        if self.numpy is not None:
            import numpy

            numpy.random.set_state(self.numpy)
        if self.python is not None:
            random.setstate(self.python)
        for generator, state in zip(generators, self.generators, strict=False):
            generator.set_state(state)

    def state_dict(self) -> dict[str, Tensor]:
        """In tensors on the CPU, which ``torch.load(weights_only=True)`` opens."""
        states = {"cpu": self.cpu, **{f"generator.{i}": state for i, state in enumerate(self.generators)}}
        if self.cuda is not None:
            states["cuda"] = self.cuda
        if self.numpy is not None:
            _, key, *rest = self.numpy
            states["numpy"] = torch.tensor([*map(int, key), *rest], dtype=torch.float64)
        version, key, gauss = self.python
        states["python"] = torch.tensor([version, *key, float("nan") if gauss is None else gauss], dtype=torch.float64)
        return states

    @classmethod
    def from_state_dict(cls, states: Mapping[str, Tensor]) -> RandomState:
        """Of what ``state_dict`` returned, whole or in part."""
        states = {name: state.cpu() for name, state in states.items()}
        numpy = python = None
        if "numpy" in states:
            *key, position, has_gauss, gauss = states["numpy"].tolist()
            numpy = ("MT19937", list(map(int, key)), int(position), int(has_gauss), gauss)
        if "python" in states:
            version, *key, gauss = states["python"].tolist()
            python = (int(version), tuple(map(int, key)), None if gauss != gauss else gauss)
        generators = [state for name, state in states.items() if name.startswith("generator.")]
        return cls(states["cpu"], states.get("cuda"), numpy, python, tuple(generators))


_NUMPY_BYTES = 4 * 624 + 4  # of a Mersenne twister: its key and its position
_numpy_seen: tuple[bytes, Any] = (b"", None)


def _numpy_state() -> Any:
    """NumPy takes 100 times as long for it as torch, so it is asked only when its memory has changed."""
    global _numpy_seen
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or type(generator := numpy.random.get_bit_generator()).__name__ != "MT19937":
        return None
    memory = ctypes.string_at(generator.ctypes.state_address, _NUMPY_BYTES)
    has_gauss = _numpy_seen[1] is not None and _numpy_seen[1][3]  # which can be drawn and leave the memory as it is
    if memory != _numpy_seen[0] or has_gauss:
        _numpy_seen = (memory, numpy.random.get_state())
    return _numpy_seen[1]
