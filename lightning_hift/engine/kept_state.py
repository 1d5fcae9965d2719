"""What an optimizer under an engine has in the place of its state between steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_hift.offload.state_tree import State


class KeptState(defaultdict[Any, State]):
    """``optimizer.state`` between steps: empty to those who go through it, so that nobody moves or casts what is kept.

    Who asks for a parameter's state gets it, to be read, or an empty one. It counts as true: tools of torch take an
    optimizer without state for one that has to be stepped first. Copies are ordinary.

    Args:
        others: What is under keys that are no parameters.
        look_up: The state that is kept for a parameter; ``None`` during a step, when missing state is new.
    """

    def __init__(self, others: Mapping[Any, State], look_up: Callable[[Any], State | None]) -> None:
        super().__init__(dict, others)
        self._look_up = look_up

    def __missing__(self, key: Any) -> State:
        kept = self._look_up(key) if isinstance(key, nn.Parameter) else None
        return super().__missing__(key) if kept is None else kept

    def __bool__(self) -> bool:
        return True

    def __copy__(self) -> defaultdict[Any, State]:  # type: ignore[override]
        return defaultdict(dict, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict,), None, None, iter(self.items())
