"""Activation checkpointing of only as many blocks as a budget of bytes demands, for each layer group anew.

Under HiFT nothing below the active group is saved for the backward pass, so each group needs its own share of
recomputation: none near the head, most at the embedding. The *first* blocks of a forward pass are checkpointed and the
last ones are kept whole. Backward goes through the last ones first and frees their activations, so that an early block
is recomputed in their room. The other way round, the last block would be recomputed while all whole ones below it are
still held, and the peak would be one block higher.

What a block needs is measured, per group, in the first batch that trains it: everything is checkpointed then, and what
autograd saves is counted, around the blocks in the forward pass and inside of each block in its recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_hift.activations.arguments import Arguments
from lightning_hift.activations.reentrant import own_checkpointing, refuse_reentrant_modules
from lightning_hift.activations.saved_bytes import ActivationProfile, BatchPlan, BlockCall, Measurement, tensors_in
from lightning_hift.groups.grouping import LayerUnit
from lightning_hift.groups.unit_search import EMBEDDING, HEAD, is_block, search_units
from lightning_hift.table import format_bytes

_SLOT = "_compiled_call_impl"  # where torch keeps what runs instead of a module's call; not copied, not pickled


class ActivationBudget:
    """Keeps what a batch holds for its backward pass within a budget of bytes, by recomputing blocks.

    Non-reentrant checkpointing, decided per batch and block. Gradients are those of a run without it, bit for bit.
    Around the forward and backward pass of each batch that trains::

        budget.begin_batch()  # after the layer group was activated
        model(batch).backward()
        budget.end_batch()

    Outside of that, and under ``no_grad``, the blocks run as ever. The first batch of each layer group, and any that is
    larger than those before it, recomputes all its blocks and is measured. The others are planned from the measured
    batch that is nearest in size, in proportion to the elements of the first block's input.

    Args:
        model: Its blocks are found in the module tree; trainable or not, each may have something to save.
        nbytes: The most that may be held for the backward pass: activations inside and around the blocks, without
            parameters, buffers, gradients and optimizer state. Smaller: more recomputation, at most one more forward
            pass through the blocks from the active group upwards.
        units: Layer units of the run, to find blocks where the search alone finds none.

    Raises:
        ValueError: ``nbytes`` is no whole number or below 1; no blocks are found; the model already does activation
            checkpointing of its own.
    """

    def __init__(self, model: nn.Module, nbytes: int, units: Sequence[LayerUnit] = ()) -> None:
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise ValueError(f"Got activation_budget={nbytes!r}; it must be a whole number of bytes, at least 1.")
        refuse_reentrant_modules(model)
        if (own := own_checkpointing(model)) is not None:
            raise ValueError(
                f"Got an activation_budget, and activation checkpointing of its own is switched on in {own}: blocks"
                " would be recomputed twice. Call model.gradient_checkpointing_disable(), or drop activation_budget."
            )
        found = _find_blocks(model, units)
        if not found:
            raise ValueError(
                f"Found no blocks in {type(model).__name__}, so there is nothing that an activation_budget could"
                " recompute. Name the blocks in units=[...], or drop activation_budget."
            )
        self.nbytes = nbytes
        self.num_checkpointed = 0  # calls of blocks in this batch, or in the last one
        self._model = model
        self._parameters = tuple(model.parameters())
        self._configs = _configs_of_transformers(model)
        self._caching: list[tuple[Any, Any]] = []
        self._profiles: dict[tuple[bool, ...], list[ActivationProfile]] = {}
        self._batch: BatchPlan | None = None
        self._blocks = [_Block(path, module, self._run) for path, module in found.items()]

    @property
    def blocks(self) -> tuple[str, ...]:
        """Paths of the blocks that may be checkpointed."""
        return tuple(block.path for block in self._blocks)

    @property
    def measuring(self) -> bool:
        """Whether this batch is being measured, with everything checkpointed."""
        return self._batch is not None and self._batch.measurement is not None

    def begin_batch(self) -> None:
        """Plan the next forward and backward pass for the parameters that are trainable now."""
        self._leave_batch()
        for block in self._blocks:
            block.wrap()
        trainable = tuple(p.requires_grad for p in self._parameters)
        self._batch = BatchPlan(self.nbytes, trainable, self._profiles.get(trainable, []))
        self.num_checkpointed = 0
        if not self._batch.known:
            self._batch.measurement = self._measure()
        # Each recomputation would write into a cache of keys and values again. Training has no use for one.
        self._caching = [(config, config.use_cache) for config in self._configs]
        for config in self._configs:
            config.use_cache = False

    def end_batch(self) -> None:
        """Take over what was measured. Outside of a batch nothing happens.

        Raises:
            ValueError: This batch needs more than the budget, even with every block checkpointed.
        """
        batch = self._leave_batch()
        if batch is None:
            return
        if batch.surprised:
            self._profiles[batch.trainable] = []
        profile = batch.measurement.profile() if batch.measurement is not None else None
        if profile is None:
            return
        if not batch.reached:
            raise RuntimeError(
                f"Got an activation_budget, but none of the blocks ({self._blocks[0].path}, ...) was called as a"
                " module. torch.compile of the whole model takes them out of reach: compile each block on its own, by"
                " block.compile(), or drop activation_budget."
            )
        self._profiles.setdefault(batch.trainable, []).append(profile)
        if (smallest := profile.smallest_budget) > self.nbytes:
            names = [n for n, p in self._model.named_parameters() if p.requires_grad]
            raise ValueError(
                f"Got activation_budget={self.nbytes} ({format_bytes(self.nbytes)}), but a batch that trains"
                f" {', '.join(names[:2])}, ... holds {smallest} bytes ({format_bytes(smallest)}) for its backward pass,"
                " whichever blocks are recomputed. Give at least that (groups nearer to the input may need more), or"
                " use smaller batches."
            )

    def close(self) -> None:
        """Undo every wrapper, also in the middle of a batch. Repeating it changes nothing."""
        self._leave_batch()
        for block in self._blocks:
            block.unwrap()

    # --- inside of a batch --------------------------------------------------------------------------------------------

    def _run(self, block: _Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = self._batch
        if batch is not None:
            batch.reached = True
        if batch is None or not torch.is_grad_enabled():
            return block.call(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        if not inputs or not any(t.requires_grad for t in (*inputs, *block.parameters)):
            return block.call(*args, **kwargs)  # below the active group, where nothing is saved
        _refuse_recomputation_by_others(block.path)
        call = BlockCall.of(block.path, inputs)
        if not batch.started and not batch.start(call):
            batch.measurement = self._measure(batch.estimate_before(call))
        if batch.measurement is None and batch.keeps(call):
            return block.call(*args, **kwargs)
        _refuse_cache(block.path, (*args, *kwargs.values()))
        self.num_checkpointed += 1
        arguments, run = Arguments(args, kwargs), block.repeatable()

        def run_with(*tensors: Tensor) -> Any:
            args, kwargs = arguments.filled(tensors)
            return run(*args, **kwargs)

        if batch.measurement is None:
            return checkpoint(run_with, *arguments.take_tensors(), use_reentrant=False)
        run = batch.measurement.measured(call, run)
        with batch.measurement.of_call(call, inputs):
            return checkpoint(run_with, *arguments.take_tensors(), use_reentrant=False)

    def _measure(self, missed: float = 0) -> Measurement:
        return Measurement((*self._parameters, *self._model.buffers()), missed)

    def _leave_batch(self) -> BatchPlan | None:
        batch, self._batch = self._batch, None
        if batch is not None and batch.measurement is not None:
            batch.measurement.leave()
        for config, use_cache in self._caching:
            config.use_cache = use_cache
        self._caching = []
        return batch


class _Block:
    """A block whose calls go through ``run``, around its compiled form if it has one."""

    def __init__(self, path: str, module: nn.Module, run: Callable[..., Any]) -> None:
        self.path = path
        self.parameters = tuple(module.parameters())
        self._module = module
        self._wrapper = lambda *args, **kwargs: run(self, args, kwargs)
        self._inner: Any = None  # what was in the slot, as a rule a compiled call

    def wrap(self) -> None:
        """Also again, if the module was compiled since."""
        if vars(self._module).get(_SLOT) is not self._wrapper:
            self._inner = vars(self._module).get(_SLOT)
            setattr(self._module, _SLOT, self._wrapper)

    def unwrap(self) -> None:
        if vars(self._module).get(_SLOT) is self._wrapper:
            delattr(self._module, _SLOT)
            if self._inner is not None:
                setattr(self._module, _SLOT, self._inner)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The call of the module as it would be without the wrapper."""
        inner = self._inner if self._inner is not None else self._module._call_impl
        return inner(*args, **kwargs)

    def repeatable(self) -> Callable[..., Any]:
        """``call``, to be run once and then recomputed: from the same buffers, and without changing them again.

        The running statistics of a batch norm would otherwise be updated twice, and a spectral norm have moved on.
        """
        owners = [(m, name) for m in self._module.modules() for name, _ in m.named_buffers(recurse=False)]
        if not owners:
            return self.call
        changed: list[tuple[nn.Module, str, Tensor]] | None = None

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal changed
            if changed is None:
                before = [
                    (owner, name, buffer, buffer._version, buffer.clone())
                    for owner, name in owners
                    if (buffer := owner._buffers[name]) is not None
                ]
                result = self.call(*args, **kwargs)
                changed = [
                    (owner, name, copy)
                    for owner, name, buffer, version, copy in before
                    # The kernels of batch norm write to their statistics without counting it as a change.
                    if owner._buffers[name] is not buffer
                    or buffer._version != version
                    or getattr(owner, "track_running_stats", False)
                ]
                return result
            now = [owner._buffers[name] for owner, name, _ in changed]
            for owner, name, copy in changed:
                owner._buffers[name] = copy.clone()
            try:
                return self.call(*args, **kwargs)
            finally:
                for (owner, name, _), buffer in zip(changed, now, strict=True):
                    owner._buffers[name] = buffer

        return run


def _find_blocks(model: nn.Module, units: Sequence[LayerUnit]) -> dict[str, nn.Module]:
    """Blocks of the module tree by path; where there are none, those among the modules of ``units``."""
    found = {
        path: member
        for name, parts in search_units(model)
        if name not in (EMBEDDING, HEAD)
        for path, member in parts
        if isinstance(member, nn.Module) and is_block(member)
    }
    if not found:
        modules = dict(model.named_modules(remove_duplicate=False))
        paths = [path for unit in units for path in unit.modules if path in modules]
        found = {path: modules[path] for path in paths if is_block(modules[path])}
    return {path: module for module, path in {module: path for path, module in found.items()}.items()}


def _configs_of_transformers(model: nn.Module) -> list[Any]:
    models = (m for m in model.modules() if hasattr(type(m), "gradient_checkpointing_enable"))
    configs = {id(config): config for m in models if (config := getattr(m, "config", None)) is not None}
    return [config for config in configs.values() if hasattr(config, "use_cache")]


def _refuse_recomputation_by_others(path: str) -> None:
    if torch._C._current_graph_task_id() != -1:  # in a backward pass
        raise RuntimeError(
            f"Block {path} is recomputed by activation checkpointing in the model itself, and an activation_budget was"
            " given. Take the calls of torch.utils.checkpoint out of forward, or drop activation_budget."
        )


def _refuse_cache(path: str, arguments: Sequence[Any]) -> None:
    if any(hasattr(argument, "get_seq_length") for argument in arguments):
        raise RuntimeError(
            f"Block {path} got a cache of keys and values, which its recomputation would write again. Pass"
            " use_cache=False and no past_key_values to the model in training_step, or drop activation_budget."
        )
