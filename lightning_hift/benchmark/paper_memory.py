"""The paper's arithmetic of memory: bytes of parameters, gradients and optimizer state, on models without memory.

A cell has the options ``model``, ``optimizer``, ``precision`` and ``method``. The report puts what the paper prints
beside our numbers (HiFT, arXiv 2401.15207, table of LLaMA-7B, and trainable parameters at m = 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hift.benchmark.matrix import Benchmark, Cell
from lightning_hift.benchmark.plots import plot_memory
from lightning_hift.benchmark.records import Record
from lightning_hift.benchmark.report import write_csv
from lightning_hift.engine.probe import state_bytes
from lightning_hift.groups.grouping import find_layer_units, group_units
from lightning_hift.table import format_markdown

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "RoBERTa-base": (
        "AutoModelForSequenceClassification",
        "roberta",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
    "RoBERTa-large": (
        "AutoModelForSequenceClassification",
        "roberta",
        {
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "GPT-2 large": ("AutoModelForCausalLM", "gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "GPT-Neo 2.7B": (
        "AutoModelForCausalLM",
        "gpt_neo",
        {"hidden_size": 2560, "num_layers": 32, "num_heads": 20, "attention_types": [[["global", "local"], 16]]},
    ),
    "LLaMA-7B": ("AutoModelForCausalLM", "llama", {}),
    "OPT-13B": (
        "AutoModelForCausalLM",
        "opt",
        {
            "hidden_size": 5120,
            "ffn_dim": 20480,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "word_embed_proj_dim": 5120,
        },
    ),
}
"""Kind of head, type, and what is not the type's default, of the models whose trainable parameters the paper counts."""
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGDM": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": torch.optim.Adagrad,
}
# Bytes per parameter of the whole model, and of the active group beside it.
PRECISIONS = {"FP32": (4, 0), "Mixed": (2 + 4, 0), "Mixed^Hi": (2, 4)}
FULL, HIFT = "full", "HiFT"
PRINTED: dict[tuple[str, str, str], tuple[float, float, float, float]] = {
    ("AdamW", "FP32", FULL): (25705.04, 25705.04, 51410.08, 100.41),
    ("AdamW", "FP32", HIFT): (25705.04, 772.03, 1544.06, 27.36),
    ("AdamW", "Mixed", FULL): (38557.56, 25705.04, 51410.08, 112.96),
    ("AdamW", "Mixed", HIFT): (38557.56, 772.03, 1544.06, 39.92),
    ("AdamW", "Mixed^Hi", HIFT): (13624.53, 772.03, 1544.06, 15.57),
    ("SGDM", "FP32", FULL): (25705.04, 25705.04, 25705.04, 75.31),
    ("SGDM", "FP32", HIFT): (25705.04, 772.03, 772.03, 26.61),
    ("SGD", "FP32", FULL): (25705.04, 25705.04, 0.0, 50.21),
    ("SGD", "FP32", HIFT): (25705.04, 772.03, 0.0, 25.86),
    ("Adafactor", "FP32", FULL): (25705.04, 25705.04, 10.82, 50.22),
    ("Adafactor", "FP32", HIFT): (25705.04, 772.03, 0.33, 25.86),
    ("Adagrad", "FP32", FULL): (25705.04, 25705.04, 25705.04, 75.31),
    ("Adagrad", "FP32", HIFT): (25705.04, 772.03, 772.03, 26.61),
}
"""Parameters, gradients, state in MB (2^20 bytes) and their sum in GB (2^30 bytes), as printed for LLaMA-7B."""
PRINTED_REDUCTIONS = {
    "RoBERTa-base": 68.71,
    "RoBERTa-large": 85.37,
    "GPT-2 large": 91.52,
    "GPT-Neo 2.7B": 94.95,
    "LLaMA-7B": 97.00,
    "OPT-13B": 97.55,
}
PRINTED_MEAN = 89.18
_MB, _GB = 2**20, 2**30
_PRINTED_TOTALS = {("FP32", HIFT): 55.41, ("Mixed", HIFT): 61.54, ("Mixed^Hi", HIFT): 36.57}


def run(configs: Sequence[str], options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Bytes by kind, and the share of parameters that never train at once.

    Raises:
        ValueError: An option is unknown.
    """
    for name, known in (("model", MODELS), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
        if options.get(name) not in known:
            raise ValueError(f"Got {name}={options.get(name)!r}; choose one of {', '.join(known)}.")
    if options.get("method") not in (FULL, HIFT):
        raise ValueError(f"Got method={options.get('method')!r}; choose {FULL!r} or {HIFT!r}.")
    groups = group_units(find_layer_units(_model(options["model"])))
    largest = max(groups, key=lambda group: group.numel)
    chosen = groups if options["method"] == FULL else [largest]
    total, active = sum(group.numel for group in groups), sum(group.numel for group in chosen)
    parameters: list[nn.Parameter] = [p for group in chosen for p in group.parameters.values()]
    states = state_bytes(OPTIMIZERS[options["optimizer"]], parameters, torch.float32)
    of_all, of_active = PRECISIONS[options["precision"]]
    memory = {
        "parameters": of_all * total + of_active * active,
        "gradients": 4 * active,
        "state": sum(state.device for state in states),
    }
    return {
        "memory": {**memory, "total": sum(memory.values())},
        "parameters": total,
        "trainable_at_once": active,
        "largest_group": largest.name,
        "reduction": 100 * (1 - active / total),
    }


@cache
def _model(name: str) -> nn.Module:
    import transformers

    kind, model_type, fields = MODELS[name]
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(model_type, **fields)
        model: nn.Module = getattr(transformers, kind).from_config(config)
    return model


# --- the report -------------------------------------------------------------------------------------------------------


def write_report(
    benchmark: Benchmark, cells: Sequence[Cell], by_device: Mapping[str, Mapping[str, Record]]
) -> list[Path]:
    """The paper's two tables with its numbers beside ours, all values in CSV, and a picture."""
    records = {key: record for found in by_device.values() for key, record in found.items()}  # no machine matters here
    found = {
        tuple(cell.options[name] for name in ("model", "optimizer", "precision", "method")): record["measured"]
        for cell in cells
        if (record := records.get(cell.key)) is not None and record["status"] == "measured"
    }
    markdown, table, picture = (Path(f"{benchmark.output}{suffix}") for suffix in (".md", ".csv", ".png"))
    memory = {key[1:]: measured for key, measured in found.items() if key[0] == "LLaMA-7B"}
    reductions = {key[0]: measured for key, measured in found.items() if key[3] == HIFT}
    parts = [f"# {benchmark.title}", benchmark.about.strip(), "## LLaMA-7B: memory by kind", _memory_table(memory)]
    files = [markdown, table]
    if find_spec("matplotlib") and memory:
        bars = {" ".join(key): {**m["memory"], "residual": 0} for key, m in memory.items() if key[0] == "AdamW"}
        plot_memory(bars, picture, "LLaMA-7B, AdamW: before activations")
        files.append(picture)
        parts.append(f"![memory]({picture.name})")
    parts += ["## Parameters that train at once, groups of one", _reduction_table(reductions)]
    markdown.write_text("\n\n".join(part for part in parts if part) + "\n")
    write_csv(table, cells, by_device)
    return files


def _memory_table(found: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> str:
    rows: list[list[object]] = []
    compared: list[tuple[float, float]] = []
    for key, measured in found.items():
        memory = measured["memory"]
        kinds = [memory[kind] / _MB for kind in ("parameters", "gradients", "state")]
        ours = [round(value, 2) for value in (*kinds, memory["total"] / _GB)]
        printed = PRINTED.get((key[0], key[1], key[2]))
        compared += zip(ours, printed or (), strict=False)
        theirs = ["-"] * 4 if printed is None else [f"{value:.2f}" for value in printed]
        total = _PRINTED_TOTALS.get((key[1], key[2]))
        rows.append([*key, *(f"{a:.2f} / {b}" for a, b in zip(ours, theirs, strict=True)), total or "-"])
    header = ["optimizer", "precision", "method", "parameters, MB", "gradients, MB", "state, MB", "sum, GB"]
    equal = sum(a == b for a, b in compared)
    apart = max((abs(a / b - 1) for a, b in compared if b), default=0.0)
    note = (
        f"Ours / printed in the paper: {equal} of {len(compared)} printed numbers are equal in every digit, the others"
        f" within {100 * apart:.4f} %. MB and GB are 2^20 and 2^30 bytes. Printed numbers of the whole model are about"
        " 0.02 MB above 4 bytes for each of LLaMA-7B's 6,738,415,616 parameters, and multiples of that. The last column"
        " is what the paper measured with activations, batch 8 x 512."
    )
    return f"{format_markdown([*header, 'paper, in all, GB'], rows)}\n\n{note}"


def _reduction_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            name,
            f"{measured['parameters'] / 1e6:.2f}M",
            f"{measured['largest_group']} {measured['trainable_at_once'] / 1e6:.2f}M",
            f"{measured['reduction']:.2f}",
            f"{PRINTED_REDUCTIONS[name]:.2f}",
        ]
        for name, measured in found.items()
    ]
    if found:
        ours = mean(measured["reduction"] for measured in found.values())
        rows.append(["mean", "", "", f"{ours:.2f}", f"{PRINTED_MEAN:.2f}"])
    return format_markdown(["model", "parameters", "largest group", "reduction, %", "paper, %"], rows)
