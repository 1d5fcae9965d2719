"""HiFT in a Lightning Trainer: switches groups at each batch, holds the learning rate, shows what happens."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.activations.checkpointing import ActivationBudget
from lightning_hift.activations.reentrant import refuse_reentrant_graph, refuse_reentrant_modules
from lightning_hift.engine.engine import HiFTEngine, attach_engines
from lightning_hift.engine.lr_scale import LRScale
from lightning_hift.engine.missed_turns import CAUSES
from lightning_hift.engine.optimizer_groups import turns_of_run
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.engine.run_words import doubts_about_length, summarize_run, tell_first_sweep
from lightning_hift.engine.sweep_lr import HoldLR, check_hold_lr
from lightning_hift.groups.grouping import GroupSize, LayerGroup
from lightning_hift.groups.schedule import Order
from lightning_hift.groups.selection import SelectionPolicy
from lightning_hift.groups.turns import Turns
from lightning_hift.offload.offloader import StateOffloader
from lightning_hift.plugin.checkpoint_io import StreamingCheckpointIO
from lightning_hift.plugin.held_rates import HeldRates
from lightning_hift.plugin.page_lock_bar import PageLockBar
from lightning_hift.plugin.precision import pass_without_gradients
from lightning_hift.plugin.resumable_loops import ResumableEpochLoop, make_loops_resumable
from lightning_hift.plugin.run_length import run_length
from lightning_hift.plugin.run_position import RunPosition
from lightning_hift.plugin.run_words import explain_frozen, warn_about_replaced, warn_about_rounding
from lightning_hift.plugin.step_values import StepValues
from lightning_hift.plugin.trainer_checks import check_trainer

_MANY = 100  # micro-batches per step, beyond which something is wrong


class HiFTCallback(Callback):
    """Fine-tunes all parameters, one layer group per batch (HiFT, arXiv 2401.15207), or by another policy.

    Add it to the callbacks of any Trainer on one device; the LightningModule stays as it is. With several optimizers
    each rotates through the groups of its own parameters. The position in the sweep is saved with the optimizer.

    Args:
        group_size: Layer units per group (m in the paper, 1 there). Larger groups mean more updates per parameter, and
            more gradients and optimizer state on the device. At the number of units or above, this is full fine-tuning.
            ``"balanced"`` joins as many as together have no more parameters than the largest unit: fewer groups where
            the embedding is large, with no more state on the device than groups of 1. Each unit trains as often as in
            groups of 1, and its neighbours with it: ``steps_per_group`` then counts for each unit of a group. Default:
            that of the policy, with HiFT ``"balanced"`` or, in very short runs, more; with others 1.
        order: ``"bottom2up"`` starts at the embedding, ``"top2down"`` at the head, ``"random"`` shuffles.
        reshuffle: With ``"random"``, draw a new order for each sweep instead of one for all.
        steps_per_group: Optimizer steps before the next group takes over. Divides the traffic of optimizer state.
            Default: as the length of the run allows, see ``choose_turns``; 4 if it is not known.
        hold_lr: ``"replay"`` keeps the learning rate constant in a sweep and makes up for the held-back scheduler steps
            at its end. ``"once"`` takes one scheduler step per sweep, as in the paper. ``"off"`` holds nothing back.
        units: Module-path patterns that replace the automatic search for layer units. A list among them forms one unit.
        frozen: Module-path patterns of what must not train in this run.
        always_active: Names or module-path patterns of units that train at every step, such as ``["head"]``. Costs
            their gradients and state on the device for the whole run. Default: those of the policy, with HiFT the head
            if it has at most an eighth of the parameters of the largest unit. ``[]``: none, as in the paper.
        seed: Seed of what is drawn at random; default: that of ``seed_everything``, or 0.
        policy: Which groups train when, in the place of ``order``, ``reshuffle`` and ``steps_per_group``: ``BAdam``,
            ``LISA``, ``HFT``, ``IST`` (also by name, with their defaults), or a ``SelectionPolicy`` of your own.
            Default: HiFT.
        lr_scale: By what to multiply the learning rate while a group is stepped. ``"auto"`` makes up for how rarely it
            trains, so that the learning rate of full fine-tuning is a good one; see ``lr_scales``. ``1.0`` leaves it as
            it is, as in the paper. Default: ``"auto"`` with HiFT, 1.0 with other policies.

    Raises:
        ValueError: An argument is out of range, or does not go with the policy.
        TypeError: ``policy`` is none.
    """

    def __init__(
        self,
        group_size: int | str | None = None,
        order: Order | str = HiFTOptions.order,
        reshuffle: bool = False,
        steps_per_group: int | None = None,
        hold_lr: HoldLR = "replay",
        units: list[str | list[str]] | None = None,
        frozen: list[str] | None = None,
        always_active: list[str] | None = None,
        seed: int | None = None,
        policy: SelectionPolicy | str | None = None,
        lr_scale: LRScale | None = None,
    ) -> None:
        check_hold_lr(hold_lr)
        self.options = HiFTOptions(
            policy,
            cast("GroupSize | None", group_size),
            cast(Order, order),
            reshuffle,
            steps_per_group,
            units,
            frozen,
            always_active,
            lr_scale=lr_scale,
        )
        """What the user has asked for."""
        self.order, self.reshuffle, self.lr_scale = self.options.order, reshuffle, self.options.scale
        self.units, self.frozen, self.always_active = units, frozen, always_active
        self.hold_lr: HoldLR = hold_lr
        self.seed = seed
        self.turns = self.options.turns
        """How layer groups take turns; chosen anew by the length of each run, as far as the user has not."""
        self.policy = self.options.make_policy()
        self._turns_on_load: Turns | None = None
        self._engines: list[HiFTEngine] = []
        self._running = False
        self._rates: HeldRates | None = None
        self._loop: ResumableEpochLoop | None = None
        self._backward_ran = False
        self._values = StepValues()
        self._backwards_without_step = 0
        self._budget: ActivationBudget | None = None
        self._graph_was_checked = self._was_compared = self._was_saved = False

    @property
    def engines(self) -> Sequence[HiFTEngine]:
        """One engine per optimizer, in the order of ``configure_optimizers``; empty before ``fit``."""
        return tuple(self._engines)

    @property
    def groups(self) -> list[LayerGroup]:
        """All layer groups, optimizer by optimizer; empty before ``fit``."""
        return [group for engine in self._engines for group in engine.groups]

    @property
    def group_size(self) -> GroupSize:
        """Layer units per group."""
        return self.turns.group_size

    @property
    def steps_per_group(self) -> int:
        """Optimizer steps of a turn."""
        return self.turns.steps_per_group

    @property
    def grouping(self) -> HiFTOptions:
        """How groups are formed: the options, with what was chosen by the length of the run."""
        return replace(self.options.with_turns(self.turns), policy=self.policy)

    @property
    def active_group(self) -> LayerGroup:
        """The group that trains now: the first optimizer's, and of several the one nearest to the input.

        Raises:
            RuntimeError: ``fit`` has not begun.
        """
        if not self._engines:
            raise RuntimeError("No layer group is active before fit has begun.")
        return self._engines[0].active_group

    # --- the hooks, in the order in which they run --------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = StreamingCheckpointIO()
        if stage != "fit":
            return
        check_trainer(trainer, HiFTCallback)
        self._engines = []
        self._running = False
        self._turns_on_load = None
        self._loop = make_loops_resumable(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        position = {} if self._loop is None else {"position": self._loop.position().state_dict()}
        return {"turns": list(self.turns), **position}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        position = state_dict.get("position")
        if "random_state" in state_dict:  # of an older checkpoint
            position = {"random_states": [[state_dict["random_state"], None, None, None]]}
        if self._loop is not None and position is not None:
            self._loop.resumed = RunPosition.from_state_dict(position, self._loop.trainer.global_rank)
        self._turns_on_load = Turns(*state_dict.get("turns", ()))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.attach(trainer)

    def choose_turns(self, trainer: pl.Trainer) -> None:
        """Settle what the user has left to the length of the run; a run that resumes goes on as it was.

        Runs before layer groups are formed. Sets up the data loaders of a run that begins, if its length decides.
        """
        strategy, asked = trainer.strategy, self.options
        size, steps = asked.group_size, asked.steps_per_group
        if self._running or asked.policy is not None or None not in (size, steps) or has_no_optimizer(strategy):
            return
        if self._turns_on_load is not None:
            loaded = self._turns_on_load
            self.turns = Turns(size or loaded.group_size, steps or loaded.steps_per_group, loaded.per_unit)
        elif trainer.ckpt_path is None and not cast(Any, trainer).fast_dev_run:
            optimizers = strategy.optimizers
            self.turns = turns_of_run(
                trainer.lightning_module,
                optimizers,
                asked,
                lambda: run_length(trainer, len(optimizers)).total_steps,
                strategy.root_device,
            )
        self.policy = asked.make_policy(self.turns)

    def attach(self, trainer: pl.Trainer) -> None:
        """Put the Trainer's optimizers and schedulers under HiFT, once per ``fit``. Runs before a checkpoint is loaded.

        Raises:
            ValueError: The grouping does not fit the model or its optimizers.
        """
        if self._running:
            return
        strategy = trainer.strategy
        if has_no_optimizer(strategy):
            raise MisconfigurationException(
                "configure_optimizers returned no optimizer, so there is nothing that HiFT could step. Return one."
            )
        self.choose_turns(trainer)
        self._engines = attach_engines(
            trainer.lightning_module,
            strategy.optimizers,
            self.grouping,
            # Of several processes, the first one's.
            seed=strategy.broadcast(self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))),
            advance_on_step=False,
            **(strategy.engine_options if hasattr(strategy, "engine_options") else self._engine_options(strategy)),
        )
        self._running = True
        strategy.optimizers = strategy.optimizers  # Lightning wraps them anew, with what the engines have changed
        self._rates = HeldRates(self.hold_lr, trainer, self._engines)

    def _engine_options(self, strategy: Any) -> dict[str, Any]:
        """Without ``HiFTStrategy`` the weights are rounded before masters could be taken from them."""
        warn_about_rounding(strategy.optimizers, strategy.lightning_module, strategy.precision_plugin)
        return {
            "make_offloader": lambda: StateOffloader(strategy.root_device, show_progress=PageLockBar()),
            "master_weights": "none",
        }

    # Until here everything is trainable, as the model summary and the user's own hooks expect.
    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.attach(trainer)
        assert self._rates is not None
        self._rates.find_length()
        if not cast(Any, trainer).fast_dev_run:
            for doubt in doubts_about_length(self._engines, self._rates.total_steps, self.options, self.turns):
                rank_zero_warn(doubt)
        self._rates.warn_about_single_steps()
        rank_zero_info(self.summary(pl_module))
        refuse_reentrant_modules(pl_module)
        nbytes = getattr(trainer.strategy, "activation_budget", None)
        if nbytes is not None:
            units = [unit for group in self.groups for unit in group.units]
            self._budget = ActivationBudget(pl_module, nbytes, units)
        self._graph_was_checked = self._was_compared = self._was_saved = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._was_compared:
            warn_about_replaced(self._engines, pl_module)
            self._was_compared = True
        for engine in self._engines:
            engine.activate()
        if self._budget is not None:
            self._budget.begin_batch()
        assert self._rates is not None
        self._rates.hold()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._observe(trainer, loss.detach())
        if self._was_saved:
            for engine in self._engines:
                engine.freeze()
            self._was_saved = False
        if loss.requires_grad:
            if not self._graph_was_checked:
                refuse_reentrant_graph(loss)
                self._graph_was_checked = True
            return
        if loss.is_inference() or all(len(engine.groups) == 1 for engine in self._engines):
            raise RuntimeError(f"The loss depends on no parameter that trains. {CAUSES}")
        # It does not depend on the active group: another loss before the step may, or the group was left out, and its
        # turn passes without an update. The backward pass does nothing.
        loss.requires_grad_(True)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._backward_ran = True
        self._backwards_without_step += 1
        if self._backwards_without_step == _MANY * trainer.accumulate_grad_batches:
            rank_zero_warn(
                f"{self._backwards_without_step} backward passes without a step of the optimizer that HiFT has seen."
                f" Only {' and '.join(g.name for engine in self._engines for g in engine.active_groups)} has been"
                " trainable all the time, because the groups take turns at calls of optimizer.step(). An optimizer that"
                " is stepped by methods of other names (first_step of SAM) cannot be used."
            )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        index, engine = self._engine_of(optimizer)
        if self._backward_ran:  # else training_step returned None
            engine.note_gradients()
            pass_without_gradients(trainer.precision_plugin, engine.optimizer)
        self._backward_ran = False
        self._backwards_without_step = 0
        engine.announce_step()
        self._values.note(index, engine)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if self._budget is not None:
            self._budget.end_batch()
        assert self._rates is not None
        self._rates.flush()
        for engine in self._engines:
            engine.settle_step()
            tell_first_sweep(engine, rank_zero_info, rank_zero_warn)
            engine.unfreeze()
        if not trainer.barebones:
            self._values.log(trainer, self._engines)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._was_saved = True  # perhaps in the middle of a batch, whose backward pass is still to come
        for engine in self._engines:
            engine.unfreeze()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._rates is not None
        self._rates.finish()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        explain_frozen(exception)
        self._close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    # --- helpers ------------------------------------------------------------------------------------------------------

    def summary(self, pl_module: torch.nn.Module) -> str:
        """The table of groups that is shown at the start of fit."""
        return summarize_run(pl_module, self._engines, math.inf if self._rates is None else self._rates.total_steps)

    def _engine_of(self, optimizer: Optimizer) -> tuple[int, HiFTEngine]:
        bare = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        for index, engine in enumerate(self._engines):
            if engine.optimizer is bare:
                return index, engine
        raise RuntimeError(
            f"{type(bare).__name__} is stepped but was not returned by configure_optimizers, so HiFT does not know"
            " which of its parameters may train. Return it there."
        )

    def _observe(self, trainer: pl.Trainer, loss: Tensor) -> None:
        """Show the loss to policies that learn: to those of optimizers that train at the moment."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        for engine in self._engines:
            if any(p.requires_grad for p in engine.active_parameters):
                # Several processes have to learn the same, so from the same.
                engine.observe(trainer.strategy.reduce(loss, reduce_op="mean") if engine.policy.learns else loss)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is a callback for another run: engines belong to the optimizers of this one.
        return {**vars(self), "_engines": [], "_running": False, "_rates": None, "_budget": None, "_loop": None}

    def _close(self) -> None:
        if self._budget is not None:
            self._budget.close()
            self._budget = None
        for engine in self._engines:
            engine.close()
        self._running = False


def find_callback(trainer: pl.Trainer) -> HiFTCallback | None:
    """The ``HiFTCallback`` of a Trainer, if it has one."""
    return next((callback for callback in cast(Any, trainer).callbacks if isinstance(callback, HiFTCallback)), None)


def has_no_optimizer(strategy: Any) -> bool:
    """Whether ``configure_optimizers`` returned none, in whose place Lightning puts one of its own."""
    return any(isinstance(optimizer, _MockOptimizer) for optimizer in strategy.optimizers)
