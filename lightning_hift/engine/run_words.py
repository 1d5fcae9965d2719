"""What a user is told about a run when it begins, and after its first sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.engine.proof import describe_sweep
from lightning_hift.groups.report import describe_groups
from lightning_hift.groups.turns import Turns

_FEW_SWEEPS = 3


def summarize_run(module: nn.Module, engines: Sequence[HiFTEngine], total_steps: float) -> str:
    """The table of groups, with what is frozen.

    Args:
        module: What is trained.
        engines: One for each of its optimizers.
        total_steps: Optimizer steps of the run; infinity if that is not known.
    """
    num_groups = sum(len(engine.groups) for engine in engines)
    text = [engines[0].policy.describe(num_groups) + _sweeps_in_run(engines[0], total_steps)]
    for engine in engines:
        most = engine.policy.most_groups
        text.append(describe_groups(engine.groups, engine.always_active, most, engine.lr_scales))
        if engine.step:
            place = engine.step % engine.policy.steps_per_sweep
            text.append(f"Resumed at optimizer step {engine.step}: sweep {engine.sweep}, step {place} of it")
    grouped = {id(p) for engine in engines for p in engine.parameters.values()}
    rest = [(name, p) for name, p in module.named_parameters() if id(p) not in grouped]
    if rest:
        names = ", ".join(name for name, _ in rest[:3]) + (", ..." if len(rest) > 3 else "")
        text.append(f"Frozen: {sum(p.numel() for _, p in rest):,} parameters in {len(rest)} tensors ({names})")
    return "\n".join(text)


def _sweeps_in_run(engine: HiFTEngine, total_steps: float) -> str:
    if math.isinf(total_steps):
        return ""
    layers = sum(len(group.units) for group in engine.groups)
    sweeps = total_steps / engine.policy.steps_per_sweep
    return f"; {total_steps:g} steps over {layers} layers: {sweeps:.3g} sweeps"


def doubts_about_length(
    engines: Sequence[HiFTEngine], total: float, asked: HiFTOptions, chosen: Turns
) -> Iterator[str]:
    """What to warn of where a run is too short for its layer groups to take turns.

    Args:
        engines: One for each optimizer.
        total: Optimizer steps of the run.
        asked: What the user has asked for.
        chosen: How groups take turns.
    """
    asks_for_turns = asked.policy is None and bool(asked.group_size or asked.steps_per_group)
    for engine in engines:
        missing = [engine.groups[index].name for index in engine.policy.left_out(total, len(engine.groups))]
        if missing:
            yield (
                f"This run has about {math.ceil(total)} optimizer steps, too few for {engine.policy.name} to come"
                f" by all {len(engine.groups)} layer groups: {len(missing)} of them will not train"
                f" ({', '.join(missing[:4])}). Train longer, take fewer steps per group, or make larger groups."
            )
        elif asks_for_turns and len(engine.groups) > 1 and 2 < engine.policy.steps_per_sweep > total / _FEW_SWEEPS:
            yield (
                f"This run has about {math.ceil(total)} optimizer steps, in which HiFT comes by each layer group"
                f" {total / engine.policy.steps_per_sweep:.2g} times with group_size={chosen.group_size!r} and"
                f" steps_per_group={chosen.steps_per_group}. Leave them out to have them chosen by the length."
            )


def tell_first_sweep(engine: HiFTEngine, inform: Callable[[str], Any], warn: Callable[[str], Any]) -> None:
    """Say what the first sweep did, once, as soon as it is over; see ``HiFTEngine.first_sweep_report``.

    Args:
        engine: After a step.
        inform: Gets the words where all parameters were updated.
        warn: Gets them otherwise.
    """
    report = engine.first_sweep_report()
    if report is not None:
        first = "first sweep" if engine.sweep == 1 else f"{engine.sweep} sweeps"
        (inform if report.complete else warn)(describe_sweep(report, first))
