"""The README.md of an exported model: what it is, how it was made, how to open it."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_hift.tasks.run_facts import Facts


def model_card(folder: Path, auto_class: str, facts: Facts, base: str | None, is_adapter: bool) -> str:
    """A model card in Markdown, with the metadata that the Hugging Face hub reads.

    Args:
        folder: Where the model is exported to, for the title and the example.
        auto_class: The class of transformers that opens it.
        facts: See ``run_facts``.
        base: Name of the pre-trained model that it was made from, if there is one.
        is_adapter: Whether the folder holds only an adapter.
    """
    on_hub = base is not None and not Path(base).exists()  # a folder is no name that others could look up
    metadata = {
        "library_name": "peft" if is_adapter else "transformers",
        **({"base_model": base} if on_hub else {}),
        "tags": ["lightning-hift"],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in metadata.items()), "---", ""]
    lines += [f"# {folder.name}", "", "```python", *_example(folder, auto_class, base, is_adapter), "```", ""]
    for section, rows in facts.items():
        lines += [f"## {section}", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()] + [""]
    return "\n".join([*lines, "## Licence", "", _licence(base)])


def _example(folder: Path, auto_class: str, base: str | None, is_adapter: bool) -> list[str]:
    name = folder.name
    if not is_adapter:
        return [f"from transformers import {auto_class}", "", f'model = {auto_class}.from_pretrained("{name}")']
    return [
        "from peft import PeftModel",
        f"from transformers import AutoConfig, {auto_class}",
        "",
        f'config = AutoConfig.from_pretrained("{name}/base")',
        f'base = {auto_class}.from_pretrained("{base or name + "/base"}", config=config)',
        f'model = PeftModel.from_pretrained(base, "{name}")',
    ]


def _licence(base: str | None) -> str:
    origin = "the training data" if base is None else f"`{base}` and that of the training data"
    return (
        f"Not chosen here: the licence of {origin} decides what may be done with these weights. Check before sharing.\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
