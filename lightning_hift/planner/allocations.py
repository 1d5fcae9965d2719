"""Live bytes of tensors, counted while real model code runs, on real tensors or on fake ones that have no memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_GRANULE = 512  # the CUDA caching allocator hands out multiples of this
Module = TypeVar("Module", bound=nn.Module)


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts the bytes of all tensors that come into being, until they are freed.

    Each storage counts once, however many views it has, in multiples of 512 bytes as in torch's CUDA allocator. What
    existed before does not count. Memory that a kernel uses internally is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._live: dict[int, int] = {}

    def reset_peak(self) -> None:
        """Start a new peak from what is live now."""
        self.peak = self.current

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
        made = [storage for storage in made if storage._cdata not in self._live]
        if made:
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for storage in made:
                if storage._cdata not in given:  # else a view of something that was there before
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._live:
            return
        nbytes = -(-storage.nbytes() // _GRANULE) * _GRANULE
        self._live[storage._cdata] = nbytes
        self.current += nbytes
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _forget(self, key: int) -> None:
        self.current -= self._live.pop(key)


class Needs(NamedTuple):
    """Bytes that are held for the backward pass when it begins, and the peak of both passes, gradients included."""

    saved: int
    peak: int


class Rehearsal:
    """Forward and backward of a copy of ``model`` without memory: the peak for each choice of active parameters.

    The real code of the model runs on fake tensors on the device "cpu". (On "meta", attention would take its plain form
    and hold matrices of length x length; the fused kernels of CPU and GPU save the same few vectors.) Two things are
    not as on a GPU: dropout inside fused attention is left out, which there costs a seed and here would cost a matrix;
    and ``autocast`` follows the CPU's list of operations.

    Args:
        model: On any device, "meta" included; it is not touched.
        dtype: Dtype of its floating-point parameters and buffers in the run; ``None`` keeps each as it is.
        autocast: Dtype of mixed precision.
        checkpointed: Paths of modules that are to run under non-reentrant activation checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        checkpointed: Iterable[str] = (),
    ) -> None:
        self._dtype = dtype
        self._autocast = autocast
        self._mode = FakeTensorMode()
        self._copy, self._twins = copy_without_memory(model, dtype, self._mode)
        self._copy.train()
        for path in checkpointed:
            _run_checkpointed(self._copy.get_submodule(path))

    def run(
        self, active: Iterable[nn.Parameter], compute_loss: Callable[[Any], Tensor], keep_gradients: bool = True
    ) -> Needs:
        """What forward and backward need on top of the weights.

        Args:
            active: Parameters of the original model that train.
            compute_loss: Maps the copy of the model to its loss, a scalar, on fake tensors on the device "cpu".
            keep_gradients: Without, each gradient is dropped as soon as it is ready.
        """
        trained = {id(self._twins[id(p)]) for p in active}
        for p in self._copy.parameters():
            p.requires_grad_(id(p) in trained)
            p.grad = None
        tracker = AllocationTracker()
        casts: AbstractContextManager[Any] = (
            torch.autocast("cpu", self._autocast) if self._autocast is not None else nullcontext()
        )
        half = self._dtype if self._dtype in (torch.bfloat16, torch.float16) else torch.get_default_dtype()
        with self._mode, tracker, _FusedAttention(), _DefaultDtype(half):
            with casts:
                loss = compute_loss(self._copy)
            saved = tracker.current
            hooks = [] if keep_gradients else [_drop_gradient_of(p) for p in self._copy.parameters() if p.requires_grad]
            loss.backward()  # type: ignore[no-untyped-call]
        for hook in hooks:
            hook.remove()
        for p in self._copy.parameters():
            p.grad = None
        return Needs(saved, tracker.peak)


def copy_without_memory(
    model: Module, dtype: torch.dtype | None = None, mode: FakeTensorMode | None = None
) -> tuple[Module, dict[int, Tensor]]:
    """A copy of ``model`` whose tensors say that they are on the device "cpu" but have no values.

    Args:
        model: On any device, "meta" included.
        dtype: Dtype of floating-point tensors in the copy; ``None`` keeps each as it is.
        mode: The mode that its tensors belong to; default: one of their own.

    Returns:
        The copy, and the twin of each original tensor by the ``id`` of the original.
    """
    twins: dict[int, Tensor] = {}
    with mode or FakeTensorMode():
        for t in (*model.parameters(), *model.buffers()):
            cast = dtype if dtype is not None and t.is_floating_point() else t.dtype
            fake = torch.empty(t.shape, dtype=cast, device="cpu")
            twins[id(t)] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
    memo: dict[int, Any] = dict(twins)
    return copy.deepcopy(model, memo), twins


def _drop_gradient_of(parameter: nn.Parameter) -> Any:
    def drop(p: nn.Parameter) -> None:
        p.grad = None

    return cast(Any, parameter).register_post_accumulate_grad_hook(drop)


def _run_checkpointed(module: nn.Module) -> None:
    forward = module.forward

    def without_dropout(*args: Any, **kwargs: Any) -> Any:
        with _FusedAttention():  # in the backward pass, which recomputes, no mode is in force
            return forward(*args, **kwargs)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(without_dropout, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    module.forward = checkpointed


class _FusedAttention(TorchFunctionMode):
    """Takes the dropout out of fused attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


class _DefaultDtype:
    """The default dtype, as Lightning's true half precision sets it around forward and backward."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self._before)


def peaks_by_depth(measure: Callable[[int], int], alike: Sequence[range]) -> dict[int, int]:
    """``measure(i)`` for every group, from few measurements.

    Within a stretch of equal blocks each block that backward does not have to reach saves the same bytes less. Each
    moment of the step (the loss, the backward pass of one block) therefore needs bytes that are linear in the index of
    the active group, and their peak, a maximum of linear functions, is convex. A convex function that lies on the chord
    at one point between its ends lies on it everywhere; so a stretch is measured at its ends and its middle, and split
    where the middle lies elsewhere.

    Args:
        measure: The peak with group i active, in bytes.
        alike: Stretches of groups, each of equal blocks, that together cover all groups.
    """
    found: dict[int, int] = {}

    def at(i: int) -> int:
        if i not in found:
            found[i] = measure(i)
        return found[i]

    def fill(first: int, last: int) -> None:
        low, high = at(first), at(last)
        if last - first < 2:
            return
        middle = (first + last) // 2
        chord = low + (high - low) * (middle - first) / (last - first)
        if abs(at(middle) - chord) > max(_GRANULE, 1e-3 * chord):
            fill(first, middle)
            fill(middle, last)
            return
        for i in range(first + 1, last):
            found.setdefault(i, round(low + (high - low) * (i - first) / (last - first)))

    for stretch in alike:
        fill(stretch[0], stretch[-1])
    return dict(sorted(found.items()))
