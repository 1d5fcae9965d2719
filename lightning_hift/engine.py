"""One optimizer under HiFT, in plain torch: which parameters train now, and where their optimizer state is.

The optimizer stays the user's own, of its own class. Three facts of ``torch.optim`` carry the whole method: a parameter
without gradient is skipped by ``step``; state is looked up per parameter; and hooks run around ``step``, ``state_dict``
and ``load_state_dict``. So the engine freezes all groups but one, lends the optimizer that group's state for the length
of the step, and keeps all other state out of ``optimizer.state``, where no foreign code can move or cast it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hift.fingerprint import cast_state, check_fingerprint, make_fingerprint
from lightning_hift.grouping import (
    LayerGroup,
    LayerUnit,
    find_layer_units,
    group_units,
    select_parameters,
    select_units,
)
from lightning_hift.offload import StateOffloader
from lightning_hift.proof import FirstSweepProof, SweepReport
from lightning_hift.schedule import Order, SweepSchedule, check_order

_REFUSED = {
    torch.optim.LBFGS: "it steps on one flat vector of all parameters and reruns its closure",
    torch.optim.SparseAdam: "it takes sparse gradients only, which layer groups of dense parameters do not have",
}
_CHECKPOINT_KEY = "hift"


class HiFTEngine:
    """Trains the parameters of one optimizer one layer group at a time (HiFT, arXiv 2401.15207).

    In a plain training loop nothing else changes::

        engine = HiFTEngine.attach(model, optimizer)
        for batch in batches:
            model(batch).backward()
            optimizer.step()  # steps the active group, then hands over to the next one

    Args:
        optimizer: Any optimizer of ``torch.optim``'s kind that steps parameter by parameter.
        groups: Layer groups over the trainable parameters of ``optimizer``.
        schedule: Which group trains at which step.
        always_active: Units that train at every step, in no group.
        offloader: Keeps the state; default: in host memory, for the device of the parameters.
        advance_on_step: Start with the first group now, and hand over to the next one after each ``optimizer.step``.
            Without it, the caller announces each step by ``announce_step`` and switches groups by ``activate``.
        held_back: Parameters that were frozen for this run and become trainable again on ``close``.

    Raises:
        ValueError: The groups do not hold the optimizer's trainable parameters exactly.
        TypeError: The optimizer cannot step one group at a time.
        RuntimeError: The optimizer is already under another engine.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        groups: Sequence[LayerGroup],
        schedule: SweepSchedule,
        always_active: Sequence[LayerUnit] = (),
        offloader: StateOffloader | None = None,
        advance_on_step: bool = True,
        held_back: Sequence[nn.Parameter] = (),
    ) -> None:
        for refused, reason in _REFUSED.items():
            if isinstance(optimizer, refused):
                raise TypeError(
                    f"{refused.__name__} cannot train one layer group at a time: {reason}. Use an optimizer that steps"
                    " parameter by parameter, such as torch.optim.AdamW."
                )
        self.optimizer = optimizer
        self.groups = tuple(groups)
        self.schedule = schedule
        self.always_active = tuple(always_active)
        self.parameters: dict[str, nn.Parameter] = {}
        for unit in (*(unit for group in self.groups for unit in group.units), *self.always_active):
            self.parameters |= unit.parameters
        self.step = 0
        self._advance_on_step = advance_on_step
        self._held_back = tuple(held_back)
        self._check_ownership()

        device = next(iter(self.parameters.values())).device
        self.offloader = offloader or StateOffloader(device)
        self._active_group = self.groups[schedule.group_at(0)]
        self._active: list[nn.Parameter] = []
        self._step_counted = False  # at most once per activate
        self._step_announced = False  # once per optimizer.step
        self._state_lent = False
        self._closed = False
        self._proof: FirstSweepProof | None = FirstSweepProof(self.parameters)
        self.held_schedulers: list[Any] = []  # each a SweepLR, whose pending steps travel with the optimizer
        self._held_on_load: tuple[int, list[dict[str, Any]]] | None = None
        self._num_owned = len(_parameters_of(optimizer))

        self._take_over_from(getattr(optimizer, "_hift_engine", None))
        self._adopt_state()
        optimizer._hift_engine = self  # type: ignore[attr-defined]
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._complete_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._divert_state_dict),
            optimizer.register_load_state_dict_post_hook(self._restore_all_held),
        ]
        if advance_on_step:
            self.activate()

    @classmethod
    def attach(cls, model: nn.Module, optimizer: Optimizer, **options: Any) -> HiFTEngine:
        """Attach an engine to the only optimizer of ``model``; see ``attach_engines`` for the options and errors."""
        return attach_engines(model, [optimizer], **options)[0]

    # --- what is going on ---------------------------------------------------------------------------------------------

    @property
    def active_group(self) -> LayerGroup:
        """The group that trains now."""
        return self._active_group

    @property
    def active_parameters(self) -> list[nn.Parameter]:
        """Parameters that train now: those of the active group and of the always-active units."""
        return list(self._active)

    @property
    def sweep(self) -> int:
        """Number of finished sweeps."""
        return self.schedule.sweep_at(self.step)

    @property
    def at_sweep_start(self) -> bool:
        """Whether the next step is the first one of a sweep."""
        return self.schedule.starts_sweep(self.step)

    def first_sweep_report(self) -> SweepReport | None:
        """What the first sweep did, once, as soon as it is over. ``None`` before that, and in a resumed run."""
        if self._proof is None or self.step < self.schedule.steps_per_sweep:
            return None
        report, self._proof = self._proof.report(), None
        return report

    # --- one step -----------------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """Make the current step's group trainable and freeze all others. Repeating it changes nothing.

        Raises:
            RuntimeError: After the engine was attached, parameters were added to the optimizer, frozen, or moved.
        """
        self._check_unchanged()
        self._active_group = self.groups[self.schedule.group_at(self.step)]
        self._active = self._parameters_at(self.step)
        active = set(self._active)
        for p in self.parameters.values():
            if p not in active:
                p.requires_grad_(False)
                p.grad = None  # a frozen parameter with a leftover gradient would still be stepped
            else:
                p.requires_grad_(True)
        self._step_counted = False
        self.offloader.hold(self._active)

    def _check_unchanged(self) -> None:
        if len(_parameters_of(self.optimizer)) != self._num_owned:
            raise RuntimeError(
                "The optimizer got new parameters after HiFT was attached to it; they belong to no layer group and"
                " would train at every step. Hand all parameters to the optimizer when it is built; to unfreeze layers"
                " later, do so between two calls of fit."
            )
        # Before the first step everything is trainable; a plain loop still has the active group as it was set. (Modules
        # with several optimizers may freeze and unfreeze in between.)
        expected = list(self.parameters.values()) if not self._active else self._active if self._advance_on_step else []
        names = {id(p): name for name, p in self.parameters.items()}
        frozen = [names[id(p)] for p in expected if not p.requires_grad]
        if frozen:
            raise RuntimeError(
                f"{frozen[:8]} were frozen after HiFT had put them into layer groups. Freeze them earlier (in __init__"
                " or configure_model), or name them in frozen=[...]."
            )
        kept_for = self.offloader.device
        moved = [p for p in self._active or expected if p.device.type != kept_for.type]
        if moved:
            raise RuntimeError(
                f"The parameters are on {moved[0].device}, but the optimizer state is kept for {kept_for}. Move the"
                " model before HiFT is attached to its optimizer."
            )

    def announce_step(self) -> None:
        """Count an attempt to step, whether or not the optimizer is then allowed to. Counts once per ``activate``."""
        self._step_announced = True
        if not self._step_counted:
            self.step += 1
            self._step_counted = True

    def check_gradients(self) -> None:
        """Refuse to step a group that the backward pass did not reach.

        Raises:
            RuntimeError: No active parameter has a gradient.
        """
        if all(p.grad is None for p in self._active):
            raise RuntimeError(self.explain_missing_gradient())

    def explain_missing_gradient(self) -> str:
        """Why the active group may have received no gradient, and what to do about it."""
        return (
            f"Layer group {self._active_group.index} ({self._active_group.name}) is the only one that trains at this"
            " step, but the loss gave it no gradient. Either the forward pass does not use it: name it in frozen=[...]."
            " Or activation checkpointing with use_reentrant=True cuts the graph below a frozen layer: pass"
            " use_reentrant=False. Or the forward pass ran under torch.no_grad, or before the group was activated."
        )

    def close(self) -> None:
        """End the run: all state to the host, ``requires_grad`` as it was before. The optimizer stays usable.

        Its ``state_dict`` goes on to contain all state and the position in the sweep. If it is stepped again without an
        engine, it first gets all its state back and then is an ordinary optimizer.
        """
        if self._closed:
            return
        self._closed = True
        for p in (*self.parameters.values(), *self._held_back):
            p.requires_grad_(True)
        self._return_lent_state()
        self.offloader.release_all()

    # --- hooks of the optimizer ---------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._closed:
            self._hand_back()
            return None
        # args[0] is the optimizer itself; a closure runs forward and backward inside step.
        closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._lend_state()
            return None

        def closure_then_state() -> Any:
            result = closure()
            self._lend_state()
            return result

        if len(args) > 1:
            return (args[0], closure_then_state, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_state}

    def _lend_state(self) -> None:
        if self._state_lent:
            return
        if self._advance_on_step:
            self.check_gradients()
            self.announce_step()
        if not self._step_announced:
            raise RuntimeError(
                "The optimizer was stepped behind the back of the Trainer, which bypasses precision, hooks and the step"
                " count. In training_step, step what self.optimizers() returns (without use_pl_optimizer=False), and"
                " nowhere else."
            )
        if self._proof is not None and self.step <= self.schedule.steps_per_sweep:
            self._proof.before_step(self._active)
        for p, state in self.offloader.take(self._active).items():
            self.optimizer.state[p] = state
        self._state_lent = True

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._closed:
            return
        if self._proof is not None:
            self._proof.after_step()
        self._return_lent_state()
        self._step_announced = False
        # With one group only, gradients are left to the Trainer, as in full fine-tuning: freed here, their memory would
        # have gone to the next forward pass and had to be found anew for the backward pass (4 to 8 % of a CPU step).
        if self._advance_on_step or len(self.groups) > 1:
            for p in self._active:
                p.grad = None
        if self._advance_on_step:
            self.activate()
        else:
            self.offloader.hold(self._parameters_at(self.step))

    def _return_lent_state(self) -> None:
        state = self.optimizer.state
        taken = {p: state.pop(p) for p in list(state) if isinstance(p, nn.Parameter)}
        # Reading optimizer.state[p] makes an empty entry, which must not take the place of the state that is kept.
        self.offloader.give({p: values for p, values in taken.items() if values})
        self._state_lent = False

    def _complete_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.offloader.drain()
        stored = {i: self.offloader.state_of(p) for i, p in enumerate(_parameters_of(self.optimizer))}
        others = {k: v for k, v in state_dict["state"].items() if k not in stored}
        state_dict["state"] = {i: state for i, state in stored.items() if state} | others
        for options in [options for s in self.held_schedulers if (options := s.caught_up_options())]:
            for group, caught_up in zip(state_dict["param_groups"], options, strict=True):
                for key, value in caught_up.items():
                    is_tensor = isinstance(group[key], torch.Tensor)
                    group[key] = torch.full_like(group[key], value) if is_tensor else value
        state_dict[_CHECKPOINT_KEY] = {
            "step": self.step,
            "dtypes": [str(p.dtype) for p in _parameters_of(self.optimizer)],
            "held": [s.held_state() for s in self.held_schedulers],
            **self._fingerprint(),
        }

    def _divert_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in optimizer.param_groups]:
            return None  # torch raises its own error for this
        position = state_dict.get(_CHECKPOINT_KEY)
        if position is not None:
            check_fingerprint(position, self._fingerprint())
        rest = dict(state_dict["state"])
        # Without a word about the weights that the state was made for, float state is cast to the weights, as in torch.
        dtypes = iter(position["dtypes"] if position is not None else [None] * self._num_owned)
        self.offloader.clear()
        for saved_group, group in zip(saved_groups, optimizer.param_groups, strict=True):
            for saved_id, p in zip(saved_group["params"], group["params"], strict=True):
                dtype = next(dtypes)
                if saved_id in rest:
                    state = cast_state(rest.pop(saved_id), dtype, p.dtype)
                    self.offloader.put(p, state, _keys_on_host(saved_group))
        self.step = position["step"] if position is not None else 0
        self._active_group = self.groups[self.schedule.group_at(self.step)]
        self._held_on_load = (self.step, position["held"]) if position is not None else None
        self._proof = None
        if self._active and not self._closed:
            self.activate()
        return {**{k: v for k, v in state_dict.items() if k != _CHECKPOINT_KEY}, "state": rest}

    def _restore_all_held(self, optimizer: Optimizer) -> None:
        for scheduler in self.held_schedulers:
            self.restore_held(scheduler)

    def restore_held(self, scheduler: Any) -> None:
        """Give a scheduler what the checkpoint that was loaded holds back for it, if no step was made since."""
        if self._held_on_load is None or self._held_on_load[0] != self.step:
            return
        index, held = self.held_schedulers.index(scheduler), self._held_on_load[1]
        if index < len(held):
            scheduler.restore_held(held[index])

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _parameters_at(self, step: int) -> list[nn.Parameter]:
        units = (*self.groups[self.schedule.group_at(step)].units, *self.always_active)
        return [p for unit in units for p in unit.parameters.values()]

    def _check_ownership(self) -> None:
        grouped = {id(p): name for name, p in self.parameters.items()}
        owned = {id(p): p for p in _parameters_of(self.optimizer)}
        strangers = [p for i, p in owned.items() if p.requires_grad and i not in grouped]
        if strangers:
            raise ValueError(
                f"The optimizer holds {len(strangers)} trainable parameters that no layer group has, of shapes"
                f" {[tuple(p.shape) for p in strangers[:4]]}; they would train at every step. Build the optimizer from"
                " the parameters of the module that is trained."
            )
        orphans = [name for i, name in grouped.items() if i not in owned]
        if orphans:
            raise ValueError(f"No optimizer holds the parameters {orphans[:8]} of the layer groups. {_ORPHAN_REMEDY}")

    def _adopt_state(self) -> None:
        """Move state that exists already, from the optimizer's constructor or an earlier run, out of the optimizer."""
        state = self.optimizer.state
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p in state:
                    self.offloader.put(p, state.pop(p), _keys_on_host(group))

    def _take_over_from(self, other: HiFTEngine | None) -> None:
        if other is None:
            return
        if not other._closed:
            raise RuntimeError(
                "This optimizer is already under HiFT. Use one engine per optimizer, and close it before attaching the"
                " next one."
            )
        other._hand_back(to_device=False)
        if other._fingerprint() == self._fingerprint():
            self.step, self._proof = other.step, None

    def _fingerprint(self) -> dict[str, Any]:
        return make_fingerprint(self.schedule, self.groups, self.always_active)

    def _hand_back(self, to_device: bool = True) -> None:
        """Give the optimizer all its state and leave it alone from now on."""
        for hook in self._hooks:
            hook.remove()
        del self.optimizer._hift_engine  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if state := self.offloader.state_of(p):
                    stays = _keys_on_host(group) if to_device else state.keys()
                    self.optimizer.state[p] = {
                        k: v.to(p.device) if isinstance(v, torch.Tensor) and k not in stays else v
                        for k, v in state.items()
                    }
        self.offloader.clear()


_ORPHAN_REMEDY = "Add them to the optimizer, or name them in frozen=[...]."


def attach_engines(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    group_size: int = 1,
    order: Order = "bottom2up",
    reshuffle: bool = False,
    steps_per_group: int = 1,
    units: Sequence[str | Sequence[str]] | None = None,
    frozen: Sequence[str] | None = None,
    always_active: Sequence[str] | None = None,
    seed: int = 0,
    make_offloader: Callable[[], StateOffloader] | None = None,
    advance_on_step: bool = True,
) -> list[HiFTEngine]:
    """Find the layer groups of ``model`` among the parameters of each optimizer and attach an engine to each.

    Args:
        model: The module that owns the parameters.
        optimizers: Together they hold every trainable parameter once. Each rotates through its own groups.
        group_size: Layer units per group (m in the paper). Larger groups mean more updates per parameter, and more
            gradients and state on the device.
        order: ``"bottom2up"``, ``"top2down"`` or ``"random"``.
        reshuffle: Draw a new random order for each sweep.
        steps_per_group: Optimizer steps before the next group takes over. Divides the traffic of state.
        units: Module-path patterns instead of the automatic search; see ``find_layer_units``.
        frozen: Module-path patterns of parameters that must not train until ``close``.
        always_active: Patterns of units that train at every step. Their gradients and state never leave the device, and
            a low one makes every backward pass a deep one.
        seed: Seed of the random order.
        make_offloader: Builds the keeper of one optimizer's state; default: host memory.
        advance_on_step: See ``HiFTEngine``.

    Raises:
        ValueError: An argument is out of range; a pattern matches nothing, or something twice; a trainable parameter is
            in no optimizer, or in two.
        TypeError: An optimizer cannot step one group at a time.
        RuntimeError: An optimizer is already under another engine.
    """
    check_order(order, reshuffle)
    units = [units] if isinstance(units, str) else units
    frozen = [frozen] if isinstance(frozen, str) else frozen
    always_active = [always_active] if isinstance(always_active, str) else always_active
    held_back = list(select_parameters(model, frozen).values()) if frozen else []
    engines: list[HiFTEngine] = []
    for p in held_back:
        p.requires_grad_(False)
    try:
        check_coverage(model, optimizers)
        found = []
        for optimizer in optimizers:
            found.append(find_layer_units(model, units, parameters=_parameters_of(optimizer)))
        always = select_units([u for part in found for u in part], always_active) if always_active else []
        for optimizer, part in zip(optimizers, found, strict=True):
            rotating = [unit for unit in part if unit not in always]
            if not rotating:
                raise ValueError(
                    "always_active matches every layer unit, which leaves nothing to rotate. That is full fine-tuning:"
                    f" use group_size={len(part)} for it."
                )
            groups = group_units(rotating, group_size)
            schedule = SweepSchedule(len(groups), order, reshuffle, steps_per_group, seed)
            fixed = [unit for unit in part if unit in always]
            offloader = make_offloader() if make_offloader else None
            engines.append(HiFTEngine(optimizer, groups, schedule, fixed, offloader, advance_on_step, held_back))
    except BaseException:
        for engine in engines:
            engine.close()
        for p in held_back:
            p.requires_grad_(True)
        raise
    return engines


def check_coverage(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse trainable parameters that no optimizer, or more than one, holds.

    Raises:
        ValueError: There are such parameters.
    """
    owners: dict[int, int] = {}
    for optimizer in optimizers:
        for i in {id(p) for p in _parameters_of(optimizer)}:
            owners[i] = owners.get(i, 0) + 1
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    orphans = [name for name, p in trainable if id(p) not in owners]
    if orphans:
        raise ValueError(f"No optimizer holds the trainable parameters {orphans[:8]}. {_ORPHAN_REMEDY}")
    shared = [name for name, p in trainable if owners[id(p)] > 1]
    if shared:
        raise ValueError(
            f"More than one optimizer holds the parameters {shared[:8]}, so no single schedule can decide when they"
            " train. Give each parameter to one optimizer."
        )


def _parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of ``optimizer``; a place in this list is an index in its ``state_dict``."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _keys_on_host(param_group: Mapping[str, Any]) -> tuple[str, ...]:
    """State that torch keeps on the host: the step count, unless a kernel on the device has to read it."""
    return () if param_group.get("fused") or param_group.get("capturable") else ("step",)
