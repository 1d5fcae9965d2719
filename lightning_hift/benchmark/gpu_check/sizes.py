"""What is measured: models, batches and steps; and the same in small, which proves the program and no number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_hift.benchmark.memory_rows import MODELS

Fields = Mapping[str, Any]
"""Arguments of ``LlamaConfig``."""


class Shape(NamedTuple):
    """Shape of a batch of tokens."""

    rows: int
    length: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}"


@dataclass(frozen=True)
class ModelSize:
    """A model whose memory and speed are measured.

    Args:
        fields: Its configuration.
        shapes: Of the batches that it is measured with.
        profiled: Whether to profile a sweep.
    """

    fields: Fields
    shapes: tuple[Shape, ...]
    profiled: bool = False


@dataclass(frozen=True)
class Sizes:
    """All sizes of one check.

    Args:
        steps: Of each run that is compared with another one.
        wide: The model of these runs: large layers and little work, so copies take as long as a step, and a missing
            wait shows.
        narrow: The model whose state is on disk, which would take minutes with the wide one.
        batch: Shape of the batches of both.
        copy_bytes: Size of a copy whose bandwidth is measured.
        copy_repeats: How many of them are timed together.
        warm_up: Steps before a measurement.
        full_steps: Measured steps of full fine-tuning; HiFT is measured for a sweep.
        models: By the name of the stage.
    """

    steps: int
    wide: Fields
    narrow: Fields
    batch: Shape
    copy_bytes: int
    copy_repeats: int
    warm_up: int
    full_steps: int
    models: Mapping[str, ModelSize]


def _layers(hidden: int, intermediate: int, heads: int, vocabulary: int) -> Fields:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 64,
    }


LARGE = Sizes(
    steps=500,
    wide=_layers(2048, 5632, 16, 2048),
    narrow=_layers(512, 1408, 8, 512),
    batch=Shape(2, 16),
    copy_bytes=2**30,
    copy_repeats=8,
    warm_up=3,
    full_steps=10,
    models={
        "llama-2-7b": ModelSize(MODELS["Llama-2-7B"], (Shape(8, 512), Shape(2, 2048)), profiled=True),
        "llama-3-8b": ModelSize(MODELS["Llama-3-8B"], (Shape(2, 2048),)),
    },
)
SMALL = Sizes(
    steps=30,
    wide=_layers(32, 64, 2, 64),
    narrow=_layers(16, 32, 2, 64),
    batch=Shape(2, 8),
    copy_bytes=2**20,
    copy_repeats=2,
    warm_up=1,
    full_steps=3,
    models={
        "llama-2-7b": ModelSize(MODELS["tiny"], (Shape(4, 16), Shape(2, 32)), profiled=True),
        "llama-3-8b": ModelSize(MODELS["tiny"], (Shape(2, 32),)),
    },
)
