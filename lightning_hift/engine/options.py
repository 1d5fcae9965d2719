"""One set of options, with one set of defaults, for all ways into HiFT."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_hift.engine.lr_scale import AUTO, LRScale, check_lr_scale
from lightning_hift.groups.grouping import BALANCED, GroupSize, check_group_size
from lightning_hift.groups.policies import POLICIES
from lightning_hift.groups.schedule import Order, SweepSchedule, check_order
from lightning_hift.groups.selection import SelectionPolicy, check_count
from lightning_hift.groups.turns import Turns
from lightning_hift.offload.offloader import Offload, StateOffloader, check_offload
from lightning_hift.precision.master_weights import MasterWeights, check_master_weights


@dataclass(frozen=True)
class HiFTOptions:
    """What trains when, and where its state lives: of the callback and the strategy, the engine and the planner.

    Args:
        policy: Which groups train at which step, in the place of ``order``, ``reshuffle`` and ``steps_per_group``; each
            optimizer gets a copy of its own. Or the name of one, such as ``"LISA"``. Default: HiFT.
        group_size: Layer units per group (m in the paper, 1 there). Larger groups mean more updates per parameter, and
            more gradients and optimizer state on the device. At the number of units or above, this is full fine-tuning.
            ``"balanced"``: see ``group_units``. Default: that of the policy, with HiFT ``"balanced"``, with others 1.
        order: ``"bottom2up"`` starts at the embedding, ``"top2down"`` at the head, ``"random"`` shuffles.
        reshuffle: With ``"random"``, draw a new order for each sweep instead of one for all.
        steps_per_group: Optimizer steps before the next group takes over. Divides the traffic of state. Default: 4, for
            each unit of a balanced group.
        units: Module-path patterns instead of the automatic search; see ``find_layer_units``.
        frozen: Module-path patterns of parameters that must not train.
        always_active: Patterns of units that train at every step; default: those of the policy, with HiFT a small head.
            Their gradients and state never leave the device, and a low one makes every backward pass a deep one.
        seed: Seed of the random order, and of what other policies draw.
        lr_scale: By what to multiply the learning rate while a group is stepped; see ``lr_scales``. Default: ``"auto"``
            with HiFT, 1.0 with other policies.
        offload: Where the state of inactive groups lives; see ``StateOffloader``, as for the next three.
        offload_directory: For ``"disk"``.
        prefetch: Fetch the next group's state while the batch before it is still computing.
        pin_memory: Use page-locked host memory.
        master_weights: What is kept beside 16-bit weights; see ``HiFTEngine``.
        max_group_numel: Elements above which a group is stepped in slices; see ``HiFTEngine``.

    Raises:
        ValueError: An argument is out of range, or does not go with the policy.
        TypeError: ``policy`` is none.
    """

    policy: SelectionPolicy | str | None = None
    group_size: GroupSize | None = None
    order: Order = "bottom2up"
    reshuffle: bool = False
    steps_per_group: int | None = None
    units: Sequence[str | Sequence[str]] | str | None = None
    frozen: Sequence[str] | str | None = None
    always_active: Sequence[str] | str | None = None
    seed: int = 0
    lr_scale: LRScale | None = None
    offload: Offload = "host"
    offload_directory: str | os.PathLike[str] | None = None
    prefetch: bool = True
    pin_memory: bool = True
    master_weights: MasterWeights = "auto"
    max_group_numel: int | None = None

    def __post_init__(self) -> None:
        if self.steps_per_group is not None:
            check_count("steps_per_group", self.steps_per_group)
        if self.group_size is not None:
            check_group_size(self.group_size)
        check_order(self.order, self.reshuffle)
        check_lr_scale(self.scale)
        check_offload(self.offload, self.offload_directory)
        check_master_weights(self.master_weights)
        if self.max_group_numel is not None and self.max_group_numel < 1:
            raise ValueError(
                f"Got max_group_numel={self.max_group_numel}; it must be at least 1, or None to slice nothing."
            )
        self._check_policy()

    def _check_policy(self) -> None:
        if self.policy is None:
            return
        names = ", ".join(map(repr, POLICIES))
        if isinstance(self.policy, str) and self.policy not in POLICIES:
            raise ValueError(
                f"Got policy={self.policy!r}; choose one of {names}, pass a SelectionPolicy, or leave it out for HiFT."
            )
        if not isinstance(self.policy, (str, SelectionPolicy)):
            raise TypeError(
                f"Got policy={self.policy!r}; it must be a SelectionPolicy, such as lightning_hift.LISA(), the name of"
                f" one ({', '.join(POLICIES)}), or None for HiFT."
            )
        asked = [
            f"{name}={value!r}"
            for name in ("order", "reshuffle", "steps_per_group")
            if (value := getattr(self, name)) != getattr(HiFTOptions, name)
        ]
        if asked:
            name = self.policy if isinstance(self.policy, str) else type(self.policy).__name__
            raise ValueError(
                f"Got {' and '.join(asked)} beside the policy {name}, which decides by itself when a group trains."
                " Leave that out, and give what it takes to the policy."
            )

    @property
    def turns(self) -> Turns:
        """How layer groups take turns, where the length of the run is not known."""
        size, steps, _ = Turns()
        is_hift = self.policy is None
        return Turns(
            self.group_size or (size if is_hift else 1),
            self.steps_per_group or steps,
            per_unit=is_hift and self.group_size in (None, BALANCED),
        )

    @property
    def scale(self) -> LRScale:
        """The factor of learning rates, or how it is found."""
        if self.lr_scale is not None:
            return self.lr_scale
        return AUTO if self.policy is None else 1.0

    def make_policy(self, turns: Turns | None = None) -> SelectionPolicy:
        """The policy, before it is bound to groups.

        Args:
            turns: Of HiFT; default: those where the length of the run is not known.
        """
        if isinstance(self.policy, str):
            return POLICIES[self.policy]()
        if self.policy is not None:
            return self.policy
        turns = turns or self.turns
        return SweepSchedule(
            order=self.order,
            reshuffle=self.reshuffle,
            steps_per_group=turns.steps_per_group,
            per_unit=turns.per_unit,
            small_head=True,
        )

    def with_turns(self, turns: Turns) -> HiFTOptions:
        """The same, with a policy of these turns in the place of what asks for one."""
        return replace(
            self,
            policy=self.make_policy(turns),
            group_size=turns.group_size,
            order=HiFTOptions.order,
            reshuffle=False,
            steps_per_group=None,
            lr_scale=self.scale,
        )

    def make_offloader(self, device: torch.device, **more: Any) -> StateOffloader:
        """What keeps the state of one optimizer, whose parameters are on ``device``; ``more``: for its constructor."""
        return StateOffloader(device, self.offload, self.prefetch, self.pin_memory, self.offload_directory, **more)


PUBLISHED: dict[str, Any] = {"group_size": 1, "steps_per_group": 1, "always_active": [], "lr_scale": 1.0}
"""Options of the paper's runs, where they are not the defaults."""
