"""One optimizer under HiFT, in plain torch: which parameters train now, and where their optimizer state is.

The optimizer stays the user's own, of its own class. Three facts of ``torch.optim`` carry the whole method: a parameter
without gradient is skipped by ``step``; state is looked up per parameter; and hooks run around ``step``, ``state_dict``
and ``load_state_dict``. So the engine freezes all groups but those that its policy selects, lends the optimizer the
state of one group at a time for the length of its step, and keeps all other state out of ``optimizer.state``, where no
foreign code can move or cast it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hift.engine.lr_scale import LRScale, lr_scales_for
from lightning_hift.engine.missed_turns import MissedTurns
from lightning_hift.engine.optimizer_checks import (
    check_divisible,
    check_optimizer,
    check_resettable,
)
from lightning_hift.engine.optimizer_groups import find_groups, select_frozen
from lightning_hift.engine.optimizer_state import OptimizerState, parameters_of
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.engine.output_graph import OutputGraph
from lightning_hift.engine.parameter_checks import check_ownership, check_shapes, check_slicing, check_unchanged
from lightning_hift.engine.proof import FirstSweepProof, SweepReport
from lightning_hift.engine.row_slices import cut_into_turns
from lightning_hift.engine.saving import Saving
from lightning_hift.engine.state_partition import UndividedState
from lightning_hift.engine.stepper import Stepper, StepWatcher
from lightning_hift.engine.sweep_rates import SweepRates
from lightning_hift.groups.fingerprint import find_differences, find_root, make_fingerprint
from lightning_hift.groups.grouping import LayerGroup, LayerUnit
from lightning_hift.groups.selection import SelectionPolicy
from lightning_hift.offload.offloader import StateOffloader
from lightning_hift.precision.master_weights import MasterWeights, resolve_master_weights


class HiFTEngine:
    """Trains the parameters of one optimizer one layer group at a time (HiFT, arXiv 2401.15207), or by another policy.

    In a plain training loop nothing else changes::

        engine = HiFTEngine.attach(model, optimizer)
        for batch in batches:
            model(batch).backward()
            optimizer.step()  # steps the active group, then hands over to the next one

    A turn in which a group gets no gradient passes without an update of it; see ``MissedTurns`` for when it is refused.

    Args:
        optimizer: Any optimizer of ``torch.optim``'s kind that steps parameter by parameter.
        groups: Layer groups over the trainable parameters of ``optimizer``.
        policy: Which groups train at which step; bound to ``groups``.
        always_active: Units that train at every step, in no group.
        offloader: Keeps the state; default: in host memory, for the device of the parameters.
        advance_on_step: Start with the first group now, and hand over to the next one after each ``optimizer.step``.
            Without it, the caller announces each step by ``announce_step`` and switches groups by ``activate``.
        held_back: Parameters that were frozen for this run and become trainable again on ``close``.
        master_weights: For weights in 16 bits: ``"full"`` keeps float32 masters (4 bytes a parameter), ``"split"`` the
            16-bit remainders of bfloat16 weights (2 bytes, the same result), ``"none"`` rounds every update to 16 bits;
            ``"auto"`` splits bfloat16 and keeps full masters of float16.
        weights_dtype: Round the weights to this dtype now, after masters were taken from them.
        max_group_numel: Step larger groups in slices of rows with at most so many elements, so that the device holds
            the state of one slice only. For optimizers that work element by element.
        lr_scale: By what to multiply the learning rate while a layer group is stepped, or ``"auto"``, by how rarely it
            trains; see ``lr_scales``. Always-active units are stepped with the learning rate as it is.
        partition: Which process keeps and steps what; default: this one everything. See ``StatePartition``.
        root: Path of the module of the model that holds all its parameters; see ``find_root``.

    Raises:
        ValueError: The groups do not hold the optimizer's trainable parameters exactly; masters are asked for weights
            that have none, or slices for an optimizer that does not work element by element.
        TypeError: The optimizer cannot step one group at a time, or its state cannot be reset as the policy asks, or
            not be divided among processes.
        RuntimeError: The optimizer is already under another engine.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        groups: Sequence[LayerGroup],
        policy: SelectionPolicy,
        always_active: Sequence[LayerUnit] = (),
        offloader: StateOffloader | None = None,
        advance_on_step: bool = True,
        held_back: Sequence[nn.Parameter] = (),
        master_weights: MasterWeights = "auto",
        weights_dtype: torch.dtype | None = None,
        max_group_numel: int | None = None,
        lr_scale: LRScale = 1.0,
        partition: UndividedState | None = None,
        root: str = "",
    ) -> None:
        check_optimizer(optimizer)
        self.partition = partition or UndividedState()
        """Which process keeps and steps what."""
        if self.partition.world_size > 1:
            check_divisible(optimizer)
        if policy.state_handling == "reset":
            check_resettable(optimizer)
        self.optimizer = optimizer
        self.groups = tuple(groups)
        self.policy = policy
        self.always_active = tuple(always_active)
        self.parameters: dict[str, nn.Parameter] = {}
        for unit in (*(unit for group in self.groups for unit in group.units), *self.always_active):
            self.parameters |= unit.parameters
        self.step = 0
        self._root = root
        self._advance_on_step = advance_on_step
        self._shapes = {name: p.shape for name, p in self.parameters.items()}
        self._needs_gradient: bool = getattr(optimizer, "needs_gradient", True)  # zeroth-order ones do not
        self.lr_scales = lr_scales_for(optimizer, lr_scale, policy, len(self.groups))
        self._held_back = tuple(held_back)
        check_ownership(optimizer, self.parameters)
        cut = [cut_into_turns(list(group.parameters.values()), max_group_numel) for group in self.groups]
        always = cut_into_turns([p for unit in self.always_active for p in unit.parameters.values()], None)
        check_slicing(optimizer, self.parameters.values(), self.groups, cut, max_group_numel)
        self.partition.assign(pieces for turns in (*cut, always) for pieces in turns)
        dtypes = {weights_dtype or p.dtype for p in self.parameters.values() if p.is_floating_point()}
        masters = resolve_master_weights(master_weights, dtypes)
        if masters != "none" and not self._needs_gradient:
            raise ValueError(
                f"Got master_weights={master_weights!r}, but {type(optimizer).__name__} moves the weights that the"
                " forward pass reads. Use master_weights='none', or precision='32-true'."
            )

        device = next(iter(self.parameters.values())).device
        self.offloader = offloader or StateOffloader(device)
        self._stepper = Stepper(optimizer, self.offloader, masters, self.partition, self.lr_scales, cut, always[0])
        self._view = self._stepper.view
        self._state = OptimizerState(optimizer, self._view, self.offloader, self._stepper.turns, self.partition)
        self._active: list[nn.Parameter] = []
        self._step_counted = False  # at most once per activate
        self._step_announced = False  # once per optimizer.step
        self._is_under_way = False  # from then on until it is made, or its batch over
        self._closed = False
        self._proof: FirstSweepProof | None = None
        if self._needs_gradient:
            self._proof = FirstSweepProof(optimizer, self.parameters, len(self.groups))
            self.watchers.append(self._proof)
        self.missed_turns = MissedTurns(len(self.groups), policy.steps_per_sweep)
        """Turns that passed without an update."""
        self.on_close: list[Callable[[], Any]] = []
        """What ``close`` calls first; may be added to."""
        self._untrained = policy.state_dict()
        self._trained: tuple[LayerGroup, ...] | None = None  # those that may have state, if it is reset; None: all
        self._num_owned = len(parameters_of(optimizer))

        other: HiFTEngine | None = getattr(optimizer, "_hift_engine", None)
        if other is not None:
            other._refuse_part()
        inherited = {} if other is None else other._state.masters()
        self._take_over_from(other)
        self._active_groups = self._select()
        self._state.adopt()
        self._state.keep_apart()
        self._state.make_masters(weights_dtype, inherited)
        if policy.state_handling == "keep":
            self._stepper.reserve_host_memory()
        optimizer._hift_engine = self  # type: ignore[attr-defined]
        self._scales_itself = getattr(optimizer, "_step_supports_amp_scaling", None)
        # A fused one would undo the scaling of gradients itself, in each of several turns, and not have them clipped.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        for name in ("train", "eval"):  # schedule-free optimizers move all weights between two points
            if callable(getattr(optimizer, name, None)):
                setattr(optimizer, name, partial(self._switch, name))
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self.rates = SweepRates(optimizer, policy, lambda: self.step)
        """The learning rates that a ``SweepLR`` holds within a sweep."""
        self._saving = Saving(
            optimizer,
            self._state,
            self._view.options,
            self.rates,
            self.partition,
            self._position,
            self._fingerprint,
            self._go_to,
            self._after_load,
        )
        if advance_on_step:
            self.activate()

    @classmethod
    def attach(cls, model: nn.Module, optimizer: Optimizer, **options: Any) -> HiFTEngine:
        """Attach an engine to the only optimizer of ``model``; see ``attach_engines`` for the options and errors."""
        return attach_engines(model, [optimizer], **options)[0]

    # --- what is going on ---------------------------------------------------------------------------------------------

    @property
    def active_groups(self) -> tuple[LayerGroup, ...]:
        """The groups that train now, from the input upwards; with HiFT it is one."""
        return self._active_groups

    @property
    def active_group(self) -> LayerGroup:
        """The group that trains now; of several, the one nearest to the input."""
        return self._active_groups[0]

    @property
    def active_parameters(self) -> list[nn.Parameter]:
        """Parameters that train now: those of the active groups and of the always-active units."""
        return list(self._active)

    @property
    def master_weights(self) -> str:
        """How masters are kept: ``"full"``, ``"split"`` or ``"none"``."""
        return self._view.master_weights

    @property
    def watchers(self) -> list[StepWatcher]:
        """What looks at the weights around each step; may be added to."""
        return self._stepper.watchers

    @property
    def sweep(self) -> int:
        """Number of finished sweeps."""
        return self.policy.sweep_at(self.step)

    @property
    def at_sweep_start(self) -> bool:
        """Whether the next step is the first one of a sweep."""
        return self.policy.starts_sweep(self.step)

    @property
    def learning_rate(self) -> float | Tensor | None:
        """What the active groups are stepped with, ``lr_scale`` included; the largest, if their parameters differ.

        ``None`` where the optimizer has no learning rate.
        """
        scaled = {p: self.lr_scales[group.index] for group in self._active_groups for p in group.parameters.values()}
        rates = [
            group["lr"] * max(scales)
            for group in self.optimizer.param_groups
            if group.get("lr") is not None and (scales := [scaled[p] for p in group["params"] if p in scaled])
        ]
        return max(rates, default=None)

    def first_sweep_report(self) -> SweepReport | None:
        """What the first sweep did, once, as soon as it is over. ``None`` before that, and in a resumed run.

        With a policy whose sweeps leave groups out, at the end of the sweep with which every group has had a turn.
        Where processes share the state, all of them have to ask after the same step.
        """
        if self._proof is None or not self._proof.is_complete:
            return None
        report = self._proof.report(self.partition.sum)
        self._forget_proof()
        return report

    # --- one step -----------------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """Make the current step's groups trainable and freeze all others. Repeating it changes nothing.

        Raises:
            RuntimeError: After the engine was attached, parameters were added to the optimizer, frozen, or moved.
        """
        self._check_unchanged()
        self._active_groups = self._select()
        units = (*(unit for group in self._active_groups for unit in group.units), *self.always_active)
        self._active = [p for unit in units for p in unit.parameters.values()]
        self.freeze()
        self._step_counted = self._is_under_way = False
        self._view.cancel()
        self._reset_inactive()
        self._stepper.hold_first(self._active_groups)

    def start(self) -> None:
        """Activate the first group, and hand over to the next one after each step, as with ``advance_on_step``.

        For parameters that were still to be moved to their device when the engine was attached.
        """
        self._advance_on_step = True
        self.activate()

    def freeze(self) -> None:
        """Let ``requires_grad`` be true for what trains now, and for what ``missed_turns`` waits for."""
        active = set(self._active)
        trainable = active | self.missed_turns.trainable(active)
        for p in self._held_back:
            p.requires_grad_(False)
        for p in self.parameters.values():
            p.requires_grad_(p in trainable)
            if p not in active:
                p.grad = None  # a frozen parameter with a leftover gradient would still be stepped

    def unfreeze(self) -> None:
        """Let ``requires_grad`` be the user's own, for what is saved or copied before the next ``activate``."""
        for p in (*self.parameters.values(), *self._held_back):
            p.requires_grad_(True)

    def observe(self, loss: Tensor | float) -> None:
        """Let a policy that learns see the loss, shape (), of the step under way. Call it before ``optimizer.step``.

        The ``HiFTCallback`` does so, and what a closure returns is seen anyway. The value is not waited for.
        """
        self.policy.observe(self.step - self._step_counted, torch.as_tensor(loss).detach())

    def _select(self) -> tuple[LayerGroup, ...]:
        """The groups of the current step, by the policy."""
        chosen = self.policy.groups_at(self.step)
        if not chosen or not set(chosen) <= set(range(len(self.groups))):
            raise ValueError(
                f"{type(self.policy).__name__}.groups_at({self.step}) returned {chosen!r}; it must name one or several"
                f" of the groups 0 to {len(self.groups) - 1}."
            )
        if self.policy.most_groups is not None and len(set(chosen)) > self.policy.most_groups:
            raise ValueError(
                f"{type(self.policy).__name__}.groups_at({self.step}) returned {chosen!r}, more than its most_groups,"
                f" {self.policy.most_groups}. Let most_groups be as many, or None if it depends."
            )
        return tuple(self.groups[index] for index in sorted(set(chosen)))

    def _reset_inactive(self) -> None:
        """Drop the state of groups that do not train any more, if the policy says so."""
        if self.policy.state_handling == "reset":
            for group in self.groups if self._trained is None else self._trained:
                for turn in self._stepper.turns_of([group] if group not in self._active_groups else []):
                    self._state.reset(turn)
            self._trained = self._active_groups

    def _check_unchanged(self) -> None:
        if not self._active and (self.master_weights != "none" or self._stepper.cuts):
            check_shapes(self.parameters, self._shapes)
        # Before the first step everything is trainable; a plain loop still has the active group as it was set. (Modules
        # with several optimizers may freeze and unfreeze in between.)
        expected = list(self.parameters.values()) if not self._active else self._active if self._advance_on_step else []
        check_unchanged(
            self.optimizer, self._num_owned, self.parameters, expected, self._active or expected, self.offloader.device
        )

    def announce_step(self) -> None:
        """Count an attempt to step, whether or not the optimizer is then allowed to. Counts once per ``activate``."""
        self._step_announced = True
        if not self._step_counted:
            self.step += 1
            self._step_counted = self._is_under_way = True
            if self._proof is not None and self._can_prove:
                self._proof.count_step([group.index for group in self._active_groups], self.at_sweep_start)

    @property
    def _can_prove(self) -> bool:
        """Whether the step can move weights. A warm-up may begin at 0; with several groups no sweep is held there."""
        return len(self.groups) > 1 or isinstance(rate := self.learning_rate, Tensor) or rate != 0

    def settle_step(self) -> None:
        """Count the step that was announced last as made, whether or not it was or will be: its batch is over.

        Until then, a state that is saved is one in which this step is still to come.
        """
        self._is_under_way = False

    def note_gradients(self) -> None:
        """Take note of active groups without a gradient: their turn passes without an update. To be called once a step.

        Raises:
            RuntimeError: No backward pass has reached a group since its first turn, a whole sweep ago.
        """
        if self._needs_gradient:
            self.missed_turns.note(self._active_groups, self.step)

    def prepare_step(self, slices: bool = True) -> None:
        """Put the active group's float32 masters in the place of its 16-bit weights, and float32 gradients likewise.

        ``optimizer.step`` does so by itself. Call it before, once backward is done, to clip in full precision. Without
        masters it does nothing.

        Args:
            slices: Also raise the gradients of what is stepped in turns (slices, or one of several active groups), as a
                whole, which takes 4 bytes an element.
        """
        if self._closed or self.master_weights == "none":
            return
        self._stepper.prepare(self._active_groups)
        if slices:
            self._view.raise_gradients(self._active)

    def raise_gradients(self) -> None:
        """Make float32 gradients of those of weights that have masters, to clip them in full precision.

        As ``prepare_step``, but the weights stay as they are, so that the step may be left out.
        """
        self._view.raise_gradients(self._active)

    def retake_masters(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let the masters of ``parameters`` be what these are now: others were loaded since the engine was attached."""
        loaded = set(parameters)
        self._view.cancel()
        self._state.make_masters(known={p: kept for p, kept in self._state.masters().items() if p not in loaded})

    def cancel_step(self) -> None:
        """Undo ``prepare_step`` where the step did not take place (gradients overflowed); drops the gradients."""
        self._view.cancel()

    def close(self) -> None:
        """End the run: all state to the host, ``requires_grad`` as it was before. The optimizer stays usable.

        Its ``state_dict`` goes on to contain all state and the position in the sweep. If it is stepped again without an
        engine, it first gets all its state back and then is an ordinary optimizer.
        """
        if self._closed:
            return
        self._closed = True
        for undo in (*self.on_close, self.missed_turns.close):
            undo()
        self.unfreeze()
        self._view.cancel()
        self.offloader.release_all()
        self.offloader.remove_files()

    # --- hooks of the optimizer ---------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_nested(optimizer):
            return None
        if self._closed:
            self._hand_back()
            return None
        if self._view.is_shown:
            self._view.cancel()  # an earlier step has failed half-way
        # args[0] is the optimizer itself; a closure runs forward and backward inside step.
        closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
        if not self._needs_gradient:  # it moves the weights before it calls its closure
            self.announce_step()
        if closure is None or not self._needs_gradient:
            self._show_all()
            return None

        def closure_then_state() -> Any:
            result = closure()
            if self._advance_on_step and isinstance(result, (Tensor, float)):
                self.observe(result)
            self._show_all()
            return result

        if len(args) > 1:
            return (args[0], closure_then_state, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_state}

    def _show_all(self) -> None:
        if self._view.is_shown:
            return
        if self._advance_on_step:
            self.note_gradients()
            self.announce_step()
        if not self._step_announced:
            raise RuntimeError(
                "The optimizer was stepped behind the back of the Trainer, which bypasses precision, hooks and the step"
                " count. In training_step, step what self.optimizers() returns (without use_pl_optimizer=False), and"
                " nowhere else. Or a LearningRateFinder, which takes all other callbacks out of the Trainer, searches"
                " in mid-run: use strategy='hift', whose optimizers go on without them."
            )
        self._stepper.begin(self._active_groups, self._active)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._closed or _is_nested(optimizer):
            return
        if not self._view.is_shown:
            self._refuse_uncalled_closure()
            return
        self._stepper.end(self.at_sweep_start)
        self._step_announced = self._is_under_way = False
        # With one group only, gradients are left to the Trainer, as in full fine-tuning: freed here, their memory would
        # have gone to the next forward pass and had to be found anew for the backward pass (4 to 8 % of a CPU step).
        if self._advance_on_step or len(self.groups) > 1:
            for p in self._active:
                p.grad = None
        if self._advance_on_step:
            self.activate()
            return
        following = self._select()
        if self.policy.state_handling == "keep" or following == self._active_groups:  # else activate drops it
            self._stepper.hold_first(following)

    def _refuse_uncalled_closure(self) -> None:
        if any(p.grad is not None for p in self._active):
            raise RuntimeError(
                f"{type(self.optimizer).__name__}.step was given a closure and stepped without calling it, so it had no"
                " optimizer state. Let it call the closure first, or give it none."
            )

    def _switch(self, name: str) -> None:
        self._stepper.switch(name)
        if not self._closed:
            self._stepper.hold_first(self._select())

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def gathered(
        self, directory: str | os.PathLike[str], group: dist.ProcessGroup | None = None
    ) -> AbstractContextManager[None]:
        """In this context, which all processes enter together, the first one's ``optimizer.state_dict()`` is whole.

        Args:
            directory: Where the first process puts files for what the others have kept.
            group: All processes, over a backend for tensors on the host; default: the default group.

        Raises:
            OSError: In all processes: the disk of the first one is full.
        """
        return self._saving.gathered(directory, group)

    def _position(self) -> dict[str, Any]:
        learned = self.policy.state_dict()
        return {"step": self.step - self._is_under_way, **({"learned": learned} if learned else {})}

    def _go_to(self, position: Mapping[str, Any]) -> None:
        self.step = position.get("step", 0)
        self.policy.load_state_dict(position.get("learned", self._untrained))
        self._active_groups, self._trained = self._select(), None
        self._forget_proof()
        self.missed_turns.close()
        if self._active and not self._closed:
            self.activate()

    def _after_load(self) -> None:
        self._trained = None
        if self._active and not self._closed:
            self._reset_inactive()

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _forget_proof(self) -> None:
        if self._proof is not None:
            self.watchers.remove(self._proof)
            self._proof = None

    def _take_over_from(self, other: HiFTEngine | None) -> None:
        if other is None:
            return
        if not other._closed:
            raise RuntimeError(
                "This optimizer is already under HiFT. Use one engine per optimizer, and close it before attaching the"
                " next one."
            )
        if not find_differences(other._fingerprint(), self._fingerprint()):
            self.step = other.step
            self._forget_proof()
            self.policy.load_state_dict(other.policy.state_dict())
        other._hand_back(to_device=False)

    def _fingerprint(self) -> dict[str, Any]:
        return make_fingerprint(self.policy, self.groups, self.always_active, self.lr_scales, self._root)

    def _hand_back(self, to_device: bool = True) -> None:
        """Give the optimizer all its state and leave it alone from now on."""
        self._refuse_part()
        for hook in self._hooks:
            hook.remove()
        del self.optimizer._hift_engine  # type: ignore[attr-defined]
        self._saving.remove()
        for name in ("train", "eval"):
            vars(self.optimizer).pop(name, None)
        if self._scales_itself is not None:
            self.optimizer._step_supports_amp_scaling = self._scales_itself  # type: ignore[attr-defined]
        self._state.hand_back(to_device)

    def _refuse_part(self) -> None:
        if self.partition.world_size > 1:
            raise RuntimeError(
                "The state of this optimizer is divided among processes, so it cannot be used without the engine that"
                " it was under. Return a new one from configure_optimizers, and resume from a checkpoint."
            )


def attach_engines(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    options: HiFTOptions | None = None,
    *,
    make_offloader: Callable[[], StateOffloader] | None = None,
    advance_on_step: bool = True,
    weights_dtype: torch.dtype | None = None,
    partition: UndividedState | None = None,
    **more: Any,
) -> list[HiFTEngine]:
    """Find the layer groups of ``model`` among the parameters of each optimizer and attach an engine to each.

    Args:
        model: The module that owns the parameters.
        optimizers: Together they hold every trainable parameter once. Each rotates through its own groups.
        options: What trains when, and where its state lives.
        make_offloader: Builds the keeper of one optimizer's state; default: as ``options`` say.
        advance_on_step: See ``HiFTEngine``.
        weights_dtype: See ``HiFTEngine``.
        partition: See ``HiFTEngine``; one for all optimizers.
        more: Fields of ``HiFTOptions`` that are to be others.

    Raises:
        ValueError: An option is out of range; a pattern matches nothing, or something twice; a trainable parameter is
            in no optimizer, or in two.
        TypeError: An optimizer cannot step one group at a time, or an option does not exist.
        RuntimeError: An optimizer is already under another engine.
    """
    options = replace(options or HiFTOptions(), **more)
    policy = options.make_policy()
    found = find_groups(model, optimizers, options, policy)
    held_back = select_frozen(model, options.frozen)
    engines: list[HiFTEngine] = []
    for p in held_back:
        p.requires_grad_(False)
    try:
        for optimizer, (groups, fixed) in zip(optimizers, found, strict=True):
            engine = HiFTEngine(
                optimizer,
                groups,
                policy.bound_to(groups, options.seed),
                fixed,
                make_offloader() if make_offloader else options.make_offloader(_device_of(groups)),
                advance_on_step,
                held_back,
                options.master_weights,
                weights_dtype,
                options.max_group_numel,
                options.scale,
                partition,
                find_root(name for name, _ in model.named_parameters()),
            )
            engines.append(engine)
            if advance_on_step:
                engine.on_close.append(model.register_forward_hook(OutputGraph(model)).remove)
    except BaseException:
        for engine in engines:
            engine.close()
        for p in held_back:
            p.requires_grad_(True)
        raise
    return engines


def _device_of(groups: Sequence[LayerGroup]) -> torch.device:
    return next(p.device for group in groups for p in group.parameters.values())


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether the step around is part of another one: a class whose step calls that of its base runs hooks twice."""
    wrapper = getattr(type(optimizer).step, "__code__", None)
    current: FrameType | None = sys._getframe(1)
    count = 0
    while current is not None and count < 2:
        if current.f_code is wrapper and current.f_locals["args"][0] is optimizer:
            count += 1
        current = current.f_back
    return count > 1
