"""The rows that the kind ``"memory"`` measures, their targets, and what others have published."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_hift.planner.setup import Setup

GIB = 2**30

MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "Llama-3-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
}
"""Fields of the published configurations; all of type "llama"."""


@dataclass(frozen=True)
class Target:
    """A limit for one measured value.

    Args:
        measure: Name of the value in a record's ``measured``, or of a ratio that the report takes between rows.
        limit: In the value's own unit.
        at_least: Whether the value must not be below the limit; otherwise it must not be above.
        unit: ``"GiB"`` for bytes, ``"%"`` for shares, ``"x"`` for ratios, ``""`` for counts.
    """

    measure: str
    limit: float
    at_least: bool = False
    unit: Literal["GiB", "%", "x", ""] = "GiB"


@dataclass(frozen=True)
class Row:
    """One configuration, measured in a process of its own.

    Args:
        name: By which it is chosen and recorded.
        what: For the reader.
        kind: ``"hift"`` trains through Lightning with HiFT; ``"full"`` and ``"cpu_offload"`` are the references, all
            parameters in a plain loop; ``"check"`` compares weights.
        model: Key of ``MODELS``.
        setup: As the planner has it, from which the run is configured, too.
        chunk_tokens: ``loss_chunk_tokens``.
        budget_for: Bytes of a device; the largest activation budget that the planner fits into it is taken.
        cap: Bytes of the device that the process may use.
        largest_batch: Take the largest batch that fits into ``cap``, from the planner's downwards.
        like_full: Take only as many layers as full fine-tuning has room for on this device.
        targets: The first one is what the row is about.
        published: Numbers of others for the same.
    """

    name: str
    what: str
    kind: Literal["hift", "full", "cpu_offload", "check"] = "hift"
    model: str = "Llama-2-7B"
    setup: Setup = field(default_factory=Setup)
    chunk_tokens: int | None = None
    budget_for: int | None = None
    cap: int | None = None
    largest_batch: bool = False
    like_full: bool = False
    targets: tuple[Target, ...] = ()
    published: str = ""


_EVERY_RUN = (
    Target("peak_over_parts", 1.03, unit="x"),
    Target("planner_error", 0.05, unit="%"),
    Target("host_over_exact", 1.02, unit="x"),
)
_HIDDEN = (*_EVERY_RUN, Target("exposed_share", 0.02, unit="%"))
_WITHIN_BUDGET = _EVERY_RUN[1:]  # activations that depend on the budget are not measured apart

_FP32 = Setup(batch_size=8, sequence_length=512)
_SPLIT = replace(_FP32, precision="bf16-true", master_weights="split")
_LLAMA3 = replace(_SPLIT, batch_size=2, sequence_length=2048, max_group_numel=2**25)
_RESIDENT = replace(_SPLIT, master_weights="none", offload="none", group_size=10**6)


def _reserved(gib: float) -> Target:
    return Target("reserved", gib * GIB)


ROWS: tuple[Row, ...] = (
    Row(
        "fp32",
        "fp32",
        setup=_FP32,
        targets=(_reserved(48), *_HIDDEN),
        published="55.41 GiB allocated (HiFT paper)",
    ),
    Row(
        "full-masters",
        "Mixed^Hi, full masters",
        setup=replace(_SPLIT, master_weights="full"),
        targets=(_reserved(36.57), *_HIDDEN),
        published="36.57 GiB (HiFT paper)",
    ),
    Row(
        "split",
        "Mixed^Hi, split masters",
        setup=_SPLIT,
        targets=(_reserved(36.57), *_HIDDEN),
        published="36.57 GiB (HiFT paper)",
    ),
    Row(
        "split-8bit",
        "Mixed^Hi, split masters, 8-bit state (torchao)",
        setup=replace(_SPLIT, eight_bit=True),
        targets=(Target("host_arena", 30 * GIB), _reserved(36.57), *_HIDDEN),
    ),
    Row(
        "split-budget",
        "Mixed^Hi, split masters, activation budget for 18 GiB",
        setup=_SPLIT,
        chunk_tokens=512,
        budget_for=18 * GIB,
        targets=(_reserved(18), *_WITHIN_BUDGET, _HIDDEN[-1]),
    ),
    Row(
        "cap-24",
        "Mixed^Hi, split masters, inside 24 GiB",
        setup=replace(_SPLIT, batch_size=3),
        cap=24 * GIB,
        targets=(_reserved(24), *_EVERY_RUN),
        published="21.8 GB without embedding and head (BAdam)",
    ),
    Row(
        "cap-48-fp32",
        "fp32, largest batch inside 48 GiB",
        setup=_FP32,
        cap=48 * GIB,
        largest_batch=True,
        targets=(_reserved(48), *_EVERY_RUN),
    ),
    Row(
        "llama3",
        "Mixed^Hi, split masters, activation budget for 18.5 GiB, no prefetch",
        model="Llama-3-8B",
        setup=replace(_LLAMA3, prefetch=False),
        chunk_tokens=256,
        budget_for=round(18.5 * GIB),
        targets=(_reserved(18.5), *_WITHIN_BUDGET),
        published="18.9 GiB, 1650 tok/s on an RTX 4090 (torchtune)",
    ),
    Row(
        "llama3-prefetch",
        "Mixed^Hi, split masters, activation budget for 18.5 GiB, prefetch",
        model="Llama-3-8B",
        setup=replace(_LLAMA3, max_group_numel=2**23),
        chunk_tokens=256,
        budget_for=round(18.5 * GIB),
        targets=(_reserved(18.5), *_WITHIN_BUDGET, _HIDDEN[-1]),
        published="18.9 GiB, 1650 tok/s on an RTX 4090 (torchtune)",
    ),
    Row(
        "speed-hift",
        "Mixed^Hi, split masters",
        setup=_SPLIT,
        like_full=True,
        targets=(
            Target("speed_over:speed-full", 1.85, True, "x"),
            Target("speed_over:speed-cpu-offload", 3.0, True, "x"),
            *_HIDDEN,
        ),
        published="0.91x with 8-bit state, 0.84x with CPU offload (torchao)",
    ),
    Row("speed-full", "full fine-tuning, bf16, resident AdamW", kind="full", setup=_RESIDENT, like_full=True),
    Row(
        "speed-cpu-offload",
        "full fine-tuning, bf16, torchao's CPUOffloadOptimizer",
        kind="cpu_offload",
        setup=_RESIDENT,
        like_full=True,
    ),
    *(
        Row(f"check-{name}", what, kind="check", model="-", targets=(Target("differing", 0, unit=""),))
        for name, what in {
            "offload": "500 steps, state on the host against on the device",
            "pressure": "500 steps, likewise, freed memory reused at once",
            "busy": "500 steps, likewise, a second stream is busy",
            "pressure-busy": "500 steps, likewise, both",
            "cpu": "25 steps, GPU against CPU (within 1e-3 of the weight + 1e-4)",
        }.items()
    ),
)


def tiny(row: Row) -> Row:
    """The same row with a model and a batch that run anywhere in a second; it proves the program, not the targets."""
    if row.kind == "check":
        return row
    setup = replace(row.setup, batch_size=2, sequence_length=16)
    if setup.max_group_numel is not None:
        setup = replace(setup, max_group_numel=2**14)
    budget_for = None if row.budget_for is None else 1  # nothing fits: the smallest budget
    return replace(row, model="tiny", setup=setup, budget_for=budget_for, cap=None, targets=(), published="")


def find_row(name: str, small: bool = False) -> Row:
    """A row by its name; with ``small``, as ``tiny`` has it.

    Raises:
        ValueError: There is none of this name.
    """
    found = {row.name: row for row in ROWS}.get(name)
    if found is None:
        raise ValueError(f"Got row={name!r}; choose one of {', '.join(row.name for row in ROWS)}.")
    return tiny(found) if small else found
