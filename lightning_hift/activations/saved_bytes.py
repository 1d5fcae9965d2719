"""What a batch saves for its backward pass, in bytes: counted by ``SavedBytes``, kept as an ``ActivationProfile``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor


class SavedBytes:
    """While entered, counts the distinct storages that autograd saves, and changes nothing about what is saved.

    Hooks that are in force already (those of a checkpoint, or of ``save_on_cpu``) go on to do their work. Nothing is
    copied and nothing waits for the device. Works on meta tensors, too.

    Args:
        ignored: Tensors that live on anyway, such as parameters and buffers.
        forward_only: Leave out what a backward pass saves when it computes something again for itself.
    """

    def __init__(self, ignored: Iterable[Tensor] = (), forward_only: bool = False) -> None:
        self._ignored = storages_of(ignored).keys()
        self._forward_only = forward_only
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self.paused = False
        self.storages: dict[int, int] = {}  # bytes by identity

    @property
    def nbytes(self) -> int:
        """Bytes counted so far."""
        return sum(self.storages.values())

    def __enter__(self) -> SavedBytes:
        # Only the innermost hooks are called; the ones below have to be called from here.
        below = torch._C._autograd._top_saved_tensors_default_hooks(False)
        # Not the tensor itself: if it is the output of its own node, the two would keep each other alive.
        keep, give_back = below if below is not None else (torch.Tensor.detach, lambda kept: kept)

        def count_and_keep(tensor: Tensor) -> Any:
            key, nbytes = _storage(tensor)
            is_left_out = self._forward_only and torch._C._current_graph_task_id() != -1  # in a backward pass
            if not self.paused and not is_left_out and key not in self._ignored:
                self.storages[key] = nbytes
            return keep(tensor)

        self._hooks = torch.autograd.graph.saved_tensors_hooks(count_and_keep, give_back)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Stop counting. Repeating it changes nothing."""
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__()


@dataclass
class BlockCall:
    """One call of a block in a forward pass.

    Args:
        block: Path of the block.
        shapes: Of the first input and of all others that have the same first dimension (the batch, as a rule).
        held: Bytes held when the block runs, if it and all blocks before it are checkpointed: their inputs, and what
            was saved around them.
        inside: Bytes that the block itself saves, besides its inputs; infinite if it was never recomputed.
        need: Bytes that are held in addition at the end of the forward pass if the block is kept whole.
    """

    block: str
    shapes: tuple[torch.Size, ...]
    held: float = 0
    inside: float = inf
    need: float = inf

    @classmethod
    def of(cls, block: str, inputs: Sequence[Tensor]) -> BlockCall:
        """The call of ``block`` with these inputs."""
        return cls(block, tuple(t.shape for t in inputs if t.shape[:1] == inputs[0].shape[:1]))

    def ratio(self, other: BlockCall) -> float | None:
        """An upper bound of what ``other`` needs in proportion to this call; ``None`` if it is larger in any dimension.

        In proportion to the elements; attention, which grows with the square of a length, shrinks with it even more.
        """
        if self.block != other.block or len(self.shapes) != len(other.shapes):
            return None
        for mine, theirs in zip(self.shapes, other.shapes, strict=True):
            if len(mine) != len(theirs) or any(a < b for a, b in zip(mine, theirs, strict=True)):
                return None
        pairs = [(a.numel(), b.numel()) for a, b in zip(self.shapes, other.shapes, strict=True)]
        return max((b / a for a, b in pairs if a), default=1.0)


@dataclass(frozen=True)
class ActivationProfile:
    """What one batch needs for its backward pass if its first blocks are checkpointed and the others kept whole.

    Args:
        before: Bytes saved before the first block.
        around: Bytes saved outside of the blocks, the inputs of the blocks included.
        calls: All calls of blocks that save anything, in forward order.
    """

    before: float
    around: float
    calls: tuple[BlockCall, ...]
    needs_from: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        sums = accumulate((call.need for call in reversed(self.calls)), initial=0.0)
        object.__setattr__(self, "needs_from", tuple(sums)[::-1])

    def peak(self, checkpointed: int) -> float:
        """The most bytes held at any time, if the first ``checkpointed`` calls recompute their activations.

        That is at the end of the forward pass, or while one of them is recomputed: then all that lies above is gone.
        """
        recomputed = [call.held + call.inside for call in self.calls[:checkpointed] if call.inside < inf]
        return max([self.around + self.needs_from[checkpointed], *recomputed])

    @property
    def smallest_budget(self) -> int:
        """The least bytes with which this batch can be run."""
        return ceil(min(self.peak(count) for count in range(len(self.calls) + 1)))

    @property
    def is_even(self) -> bool:
        """Whether all calls have inputs of the same shapes, so that the first one speaks for all."""
        return all(call.shapes == self.calls[0].shapes for call in self.calls)


class Measurement:
    """Counts what a batch saves while all of its blocks are checkpointed.

    Args:
        ignored: Tensors that live on anyway, such as parameters and buffers.
        missed: Bytes that the batch has saved already, as far as that is known.
    """

    def __init__(self, ignored: Sequence[Tensor], missed: float = 0) -> None:
        self._ignored = ignored
        self._missed = missed
        self._before: float | None = None
        self._calls: list[BlockCall] = []
        self._own_inputs: list[dict[int, int]] = []  # of each call, without those of the calls before it
        self._inputs: dict[int, int] = {}
        self._saved_inputs: set[int] = set()  # inputs that a block itself saves, too
        self._around = SavedBytes(ignored, forward_only=True)
        self._around.__enter__()

    def leave(self) -> None:
        """Stop counting around the blocks."""
        self._around.leave()

    @contextmanager
    def of_call(self, call: BlockCall, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Note the call that is made inside, by a checkpoint that holds its inputs."""
        if self._before is None:
            self._before = self._bytes_around()
        own = {key: nbytes for key, nbytes in storages_of(inputs).items() if key not in self._inputs}
        self._inputs |= own
        self._own_inputs.append(own)
        self._calls.append(call)
        call.held = self._bytes_around()
        self._around.paused = True
        try:
            yield
        finally:
            self._around.paused = False

    def measured(self, call: BlockCall, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, but its second time, the recomputation, is counted for ``call``."""
        first_time = True

        def run_and_count(*args: Any, **kwargs: Any) -> Any:
            nonlocal first_time
            if first_time:
                first_time = False
                return run(*args, **kwargs)
            inputs, saved = storages_of(tensors_in((args, kwargs))), SavedBytes(self._ignored)
            try:  # which a checkpoint leaves by an exception as soon as it has all it needs
                with saved:
                    return run(*args, **kwargs)
            finally:
                self._saved_inputs |= inputs.keys() & saved.storages.keys()
                call.inside = sum(nbytes for key, nbytes in saved.storages.items() if key not in inputs)

        return run_and_count

    def profile(self) -> ActivationProfile | None:
        """What was found; ``None`` if no backward pass went through the blocks."""
        around = self._bytes_around()
        if not around or (self._calls and all(call.inside == inf for call in self._calls)):
            return None
        held_anyway = self._saved_inputs | self._around.storages.keys()
        for call, own in zip(self._calls, self._own_inputs, strict=True):
            # Only a checkpoint holds those inputs that the block does not save.
            call.need = call.inside - sum(nbytes for key, nbytes in own.items() if key not in held_anyway)
        return ActivationProfile(self._before or 0, around, tuple(self._calls))

    def _bytes_around(self) -> float:
        return self._missed + sum((self._around.storages | self._inputs).values())


class BatchPlan:
    """Decides call by call, in forward order, what one batch keeps whole.

    Args:
        nbytes: The budget.
        trainable: Which parameters train.
        known: Measured batches that trained the same.
    """

    def __init__(self, nbytes: int, trainable: tuple[bool, ...], known: Sequence[ActivationProfile]) -> None:
        self.trainable = trainable
        self.known = known
        self.measurement: Measurement | None = None
        self.reached = False  # a block was called, whether or not it saves anything
        self.started = False  # a block was called that does
        self.surprised = False  # by calls that the measured batch did not make
        self._nbytes = nbytes
        self._profile: ActivationProfile | None = None
        self._next = 0
        self._ratio = 0.0
        self._kept = 0.0

    def start(self, call: BlockCall) -> bool:
        """Choose the measured batch to plan by, from the first call; false if a new measurement is needed."""
        self.started = True
        if self.measurement is not None:
            return True
        fitting = [(ratio, p) for p in self.known if p.calls and (ratio := p.calls[0].ratio(call)) is not None]
        if not fitting:
            return False
        ratio, self._profile = max(fitting, key=lambda fit: (fit[0], fit[1].needs_from[0]))
        self._ratio = ratio if self._profile.is_even else 1.0
        return True

    def estimate_before(self, call: BlockCall) -> float:
        """Bytes saved before the first call, where the counting begins only now."""
        sizes = [(p.before, p.calls[0].shapes[0].numel()) for p in self.known if p.calls]
        return max((before * call.shapes[0].numel() / max(size, 1) for before, size in sizes), default=0.0)

    def keeps(self, call: BlockCall) -> bool:
        """Whether the budget allows for this call and all later ones to be whole."""
        assert self._profile is not None
        index, self._next = self._next, self._next + 1
        measured = self._profile.calls[index] if index < len(self._profile.calls) else None
        ratio = measured.ratio(call) if measured is not None else None
        if self.surprised or measured is None or ratio is None:
            self.surprised = True
            return False
        self._ratio = max(self._ratio, ratio)
        planned = self._ratio * (self._profile.around + self._profile.needs_from[index]) + self._kept
        if planned > self._nbytes + 0.5:  # half a byte for the rounding of ratios
            return False
        self._kept += self._ratio * measured.need
        return True


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def storages_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the memory that the tensors are views of, by its identity."""
    return dict(map(_storage, tensors))


def _storage(tensor: Tensor) -> tuple[int, int]:
    """What two views of the same memory have in common, on the meta device, too, and its bytes."""
    try:
        storage = tensor.untyped_storage()
        return storage._cdata, storage.nbytes()
    except (NotImplementedError, RuntimeError):  # tensors without a storage of their own: sparse, wrapper subclasses
        return id(tensor), tensor.numel() * tensor.element_size()
