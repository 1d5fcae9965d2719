"""A model as the planner sees it: groups, optimizer, arithmetic per token, and batches rehearsed without memory."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hift.engine.optimizer_checks import check_optimizer
from lightning_hift.engine.optimizer_groups import find_groups
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.engine.probe import StateBytes, live_state_bytes
from lightning_hift.groups.grouping import GroupSize, LayerGroup, LayerUnit, group_units
from lightning_hift.groups.selection import SelectionPolicy
from lightning_hift.planner.allocations import Needs, Rehearsal, copy_without_memory, peaks_by_depth
from lightning_hift.planner.made_up_batch import ComputeLoss, find_loss
from lightning_hift.planner.transient import transient_bytes

_PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "64-true": (torch.float64, None),
}
_SHORT = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true", "None": "32-true"}


def parse_precision(precision: object) -> tuple[str, torch.dtype, torch.dtype | None]:
    """Lightning's name of a precision in full, the dtype of its weights, and that of its autocast.

    Raises:
        ValueError: The planner does not know it.
    """
    name = _SHORT.get(str(precision), str(precision))
    if name not in _PRECISIONS:
        raise ValueError(f"Got precision={precision!r}; the planner knows {', '.join(map(repr, _PRECISIONS))}.")
    return name, *_PRECISIONS[name]


class Workload:
    """What a run of ``model`` consists of, whatever the precision and the batch.

    Args:
        model: On any device, "meta" included; it is not touched.
        optimizer: Builds the optimizer from parameters; default: what ``configure_optimizers`` returns, or AdamW.
        compute_loss: How a batch is computed; default: found for models that take ``input_ids``, or that have an
            ``example_input_array``.
        policy: See ``attach_engines``.
        units: See ``attach_engines``.
        frozen: See ``attach_engines``.
        always_active: See ``attach_engines``.

    Raises:
        ValueError: The grouping does not fit the model, there is more than one optimizer, or the policy does not say
            how many groups train at once.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Any], Optimizer] | None = None,
        compute_loss: ComputeLoss | None = None,
        *,
        policy: SelectionPolicy | None = None,
        units: Sequence[str | Sequence[str]] | None = None,
        frozen: Sequence[str] | None = None,
        always_active: Sequence[str] | None = None,
    ) -> None:
        self.policy = policy or HiFTOptions().make_policy()
        self.notes: list[str] = []
        if (most := self.policy.most_groups) is None:
            raise ValueError(
                f"The planner does not know how many layer groups {self.policy.name} trains at once, and so not the"
                " peak. Plan without the policy and with a group_size of all units, full fine-tuning, which needs more."
            )
        if most > 1:
            self.notes.append(
                f"{self.policy.name} trains {most} layer groups at once: each row is one group with the largest others,"
                " and of equal ones the lowest."
            )
        self._unplanned: set[tuple[str, bool]] = set()  # precisions, and whether blocks are recomputed
        self.model, _ = copy_without_memory(model)
        self.optimizer = self._optimizer(optimizer)
        check_optimizer(self.optimizer)
        (found,) = find_groups(
            self.model,
            [self.optimizer],
            HiFTOptions(units=units, frozen=frozen, always_active=always_active, group_size=1),
            self.policy,
        )
        self.units: list[LayerUnit] = [unit for group in found.groups for unit in group.units]
        self.always_active = found.always_active
        self._compute_loss = compute_loss or find_loss(self.model)
        if self._compute_loss is None:
            self.notes.append(
                "Activations are not planned: no batch can be made up for this model. Give it an example_input_array,"
                " or call make_plan with compute_loss."
            )
        self._multiplied = _multiplied_numel(self.model, [*self.units, *self.always_active])
        self._rehearsals: dict[tuple[str, bool], Rehearsal] = {}
        self._needs: dict[tuple[Any, ...], Needs] = {}
        self._states: dict[torch.dtype, dict[nn.Parameter, StateBytes]] = {}
        self._transients: dict[tuple[Any, ...], int] = {}

    def _optimizer(self, make: Callable[[Any], Optimizer] | None) -> Optimizer:
        if make is not None:
            return make(self.model.parameters())
        found: list[Optimizer] = []
        if _is_lightning_module(self.model):
            try:
                found = _optimizers_in(cast(Any, self.model).configure_optimizers())
            except Exception as error:  # user code may want a Trainer, a data module, anything
                self.notes.append(f"AdamW is planned for: configure_optimizers failed without a run ({error}).")
        if len(found) > 1:
            raise ValueError(f"Got {len(found)} optimizers from configure_optimizers; the planner takes one.")
        return found[0] if found else torch.optim.AdamW(self.model.parameters())

    def groups(self, group_size: GroupSize) -> list[LayerGroup]:
        """Layer groups; see ``group_units``."""
        return group_units(self.units, group_size)

    def trained_with(self, groups: Sequence[LayerGroup], index: int) -> list[int]:
        """The most demanding groups that train at once, if ``index`` is among them: it, and the largest others."""
        others = sorted((i for i in range(len(groups)) if i != index), key=lambda i: (-groups[i].numel, i))
        return [index, *others[: (self.policy.most_groups or 1) - 1]]

    def trained_groups(self, group_size: GroupSize) -> list[LayerGroup]:
        """For each layer group, all that trains at once in the worst case, as one group."""
        groups = self.groups(group_size)
        members = [sorted(self.trained_with(groups, i)) for i in range(len(groups))]
        return [LayerGroup(i, tuple(u for m in ms for u in groups[m].units)) for i, ms in enumerate(members)]

    def tensor_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all parameters and buffers if the floating-point ones are of ``dtype``."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors)

    def state(self, dtype: torch.dtype) -> Mapping[nn.Parameter, StateBytes]:
        """Bytes of optimizer state per parameter, if parameters are stepped in ``dtype``."""
        if dtype not in self._states:
            self._states[dtype] = live_state_bytes(self.optimizer, dtype)
        return self._states[dtype]

    def transient(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> int:
        """Temporary bytes of one optimizer step; see ``transient_bytes``."""
        key = (dtype, tuple(tuple(p.shape) for p in parameters))
        if key not in self._transients:
            self._transients[key] = transient_bytes(self.optimizer, parameters, dtype)
        return self._transients[key]

    def needs(
        self,
        precision: str,
        group_size: GroupSize,
        batch_size: int,
        sequence_length: int,
        checkpointed: bool = False,
        ends_only: bool = False,
        keep_gradients: bool = True,
    ) -> dict[int, Needs] | None:
        """What forward and backward need beside the weights, by active group.

        Args:
            precision: Lightning's name.
            group_size: Layer units per group, or ``"balanced"``. At the number of units, there is one group.
            batch_size: Rows per micro-batch.
            sequence_length: Tokens per row.
            checkpointed: Run every repeated block under activation checkpointing.
            keep_gradients: Without, each gradient leaves as soon as it is ready.
            ends_only: Only the groups among which the largest peak is: the ends of each stretch of equal blocks.

        Returns:
            ``None`` if no batch can be computed; ``notes`` says why.
        """
        groups = self.trained_groups(group_size)
        alike = _alike(groups)

        def measure(i: int) -> Needs:
            key = (precision, group_size, i, batch_size, sequence_length, checkpointed, keep_gradients)
            if key not in self._needs:
                self._needs[key] = self._rehearse(
                    groups[i], precision, batch_size, sequence_length, checkpointed, keep_gradients
                )
            return self._needs[key]

        if self._compute_loss is None or (precision, checkpointed) in self._unplanned:
            return None
        try:
            if ends_only:
                return {i: measure(i) for stretch in alike for i in (stretch[0], stretch[-1])}
            saved = peaks_by_depth(lambda i: measure(i).saved, alike)
            peaks = peaks_by_depth(lambda i: measure(i).peak, alike)
            return {i: Needs(saved[i], peaks[i]) for i in saved}
        except Exception as error:  # model code that needs the values of its tensors, and anything else
            self._unplanned.add((precision, checkpointed))
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            how = f"precision={precision}{', blocks recomputed' if checkpointed else ''}"
            self.notes.append(f"Activations are not planned: {reason} ({how})")
            return None

    def _rehearse(
        self, group: LayerGroup, precision: str, batch: int, length: int, checkpointed: bool, keep_gradients: bool
    ) -> Needs:
        if (precision, checkpointed) not in self._rehearsals:
            _, dtype, autocast = parse_precision(precision)
            blocks = self.blocks if checkpointed else ()
            self._rehearsals[precision, checkpointed] = Rehearsal(self.model, dtype, autocast, blocks)
        units = (*group.units, *self.always_active)
        active = [p for unit in units for p in unit.parameters.values()]
        compute = cast(ComputeLoss, self._compute_loss)
        rehearsal = self._rehearsals[precision, checkpointed]
        return rehearsal.run(active, lambda model: compute(model, batch, length), keep_gradients)

    @cached_property
    def block_units(self) -> list[LayerUnit]:
        """The blocks: units with parameters of the same shapes as another one's."""
        count = Counter(map(_shapes, self.units))
        return [unit for unit in self.units if count[_shapes(unit)] > 1]

    @cached_property
    def block_parameters(self) -> dict[LayerUnit, list[nn.Parameter]]:
        """All parameters of each block's modules, frozen ones included."""
        named = dict(self.model.named_parameters())
        inside = {unit: (unit.modules, tuple(f"{path}." for path in unit.modules)) for unit in self.block_units}
        return {
            unit: [p for name, p in named.items() if name in paths or name.startswith(starts)]
            for unit, (paths, starts) in inside.items()
        }

    @property
    def blocks(self) -> list[str]:
        """Paths of the blocks."""
        return [path for unit in self.block_units for path in unit.modules]

    def crossed(self, group: LayerGroup) -> list[LayerUnit]:
        """Units that the backward pass goes through when ``group`` trains: from the lowest that trains upwards."""
        units, position = [*self.units, *self.always_active], self._positions()
        lowest = min(position[i] for i, unit in enumerate(units) if unit in (*group.units, *self.always_active))
        return [unit for i, unit in enumerate(units) if position[i] >= lowest]

    def flops_per_token(self, group: LayerGroup, checkpointed: bool = False) -> int:
        """Multiplications and additions of a step in which ``group`` trains, in matrices of weights alone."""
        by_unit = dict(zip(map(id, (*self.units, *self.always_active)), self._multiplied[1], strict=True))
        crossed = sum(by_unit[id(unit)] for unit in self.crossed(group))
        updated = sum(by_unit[id(unit)] for unit in (*group.units, *self.always_active))
        return 2 * (self._multiplied[0] + crossed + updated + (crossed if checkpointed else 0))

    def _positions(self) -> list[int]:
        """The place of each unit in the forward pass: always-active units are kept apart, but are in it."""
        order = {id(p): place for place, p in enumerate(self.model.parameters())}
        units = [*self.units, *self.always_active]
        place = [min(order[id(p)] for p in unit.parameters.values()) for unit in units]
        if not self.always_active:
            return list(range(len(units)))
        rank = {value: index for index, value in enumerate(sorted(place))}
        return [rank[value] for value in place]


def _shapes(part: LayerUnit | LayerGroup) -> tuple[torch.Size, ...]:
    return tuple(p.shape for p in part.parameters.values())


def _alike(groups: Sequence[LayerGroup]) -> list[range]:
    """Stretches of neighbouring groups with parameters of the same shapes."""
    stretches = []
    for _, members in groupby(enumerate(groups), key=lambda pair: _shapes(pair[1])):
        indices = [i for i, _ in members]
        stretches.append(range(indices[0], indices[-1] + 1))
    return stretches


def _multiplied_numel(model: nn.Module, units: Sequence[LayerUnit]) -> tuple[int, list[int]]:
    """Elements of weight matrices that each token is multiplied with: in all, and by unit. A tied one counts twice."""
    by_unit, total = [0] * len(units), 0
    homes = {path: i for i, unit in enumerate(units) for path in unit.modules}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        numel = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
        total += numel
        parts = path.split(".")
        home = next((homes[h] for n in range(len(parts), 0, -1) if (h := ".".join(parts[:n])) in homes), None)
        if home is not None:
            by_unit[home] += numel
    return total, by_unit


def _is_lightning_module(model: nn.Module) -> bool:
    # Without Lightning's import there are none.
    lightning = sys.modules.get("lightning.pytorch")
    return lightning is not None and isinstance(model, lightning.LightningModule)


def _optimizers_in(configured: Any) -> list[Optimizer]:
    """The optimizers in what ``configure_optimizers`` may return."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return _optimizers_in(configured.get("optimizer"))
    if isinstance(configured, (list, tuple)):
        return [optimizer for part in configured for optimizer in _optimizers_in(part)]
    return []
