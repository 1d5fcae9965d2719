"""A trained network as a folder that transformers (or peft) opens, from a module or from a checkpoint alone.

A checkpoint of Lightning holds weights, but not what they are weights of. So a ``TransformerModule`` adds a record: the
configuration, the adapter, the tokenizer's files and facts about the run, which with the weights make up the folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from lightning_hift.offload.sharded_tensors import is_sharded
from lightning_hift.tasks.model_card import model_card
from lightning_hift.tasks.network import DType
from lightning_hift.tasks.run_facts import Facts, TrainedModule, run_facts

EXPORT_KEY = "lightning_hift_export"
"""Where a checkpoint has its record."""

_PREFIX = "network."
_BASE = "base"  # subfolder of an adapter's folder


@dataclass(frozen=True)
class ExportRecord:
    """What makes a transformers folder of bare weights. Strings, numbers and bytes only.

    Args:
        auto_class: The class of transformers that the network was made by.
        config: The configuration's fields, as JSON.
        generation_config: Those of how to generate, as JSON, where the network can.
        adapter: The configuration of a peft adapter, as JSON.
        base: Name or folder of the pre-trained weights; ``None`` where training began from random ones.
        tokenizer: Content of the tokenizer's files by their names.
        facts: See ``run_facts``.
    """

    auto_class: str
    config: str
    generation_config: str | None
    adapter: str | None
    base: str | None
    tokenizer: dict[str, bytes]
    facts: Facts

    @classmethod
    def of(cls, module: TrainedModule, tokenizer: dict[str, bytes]) -> ExportRecord:
        """The record of a module whose network is built."""
        network: Any = module.network
        base = network.get_base_model() if module.adapter is not None else network
        config = json.loads(base.config.to_json_string(use_diff=False))
        if "use_cache" in config and "use_cache" not in module.source.model_config:
            config["use_cache"] = getattr(type(base.config), "use_cache", True)  # off for training only
        generation = getattr(base, "generation_config", None)
        generation = None if generation is None else {**generation.to_dict(), "use_cache": config.get("use_cache")}
        return cls(
            auto_class=module.head,
            config=json.dumps(config),
            generation_config=None if generation is None else json.dumps(generation, default=str),
            adapter=None if module.adapter is None else _adapter_as_json(network),
            base=None if module.source.random_weights else module.source.model,
            tokenizer=tokenizer,
            facts=run_facts(module),
        )


@lru_cache(maxsize=1)  # each checkpoint has them
def read_tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Content of the files that a tokenizer saves, by their paths in its folder; nothing for ``None``."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def save_pretrained(
    module: TrainedModule,
    folder: str | Path,
    tokenizer: Any = None,
    dtype: DType | None = None,
    merge: bool = False,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Write the network of a module; see ``TransformerModule.save_pretrained``."""
    if module.network is None:
        raise RuntimeError(
            f"{type(module).__name__} has no network yet, so there is nothing to save. Fit it first, or call"
            " configure_model()."
        )
    if any(is_sharded(p) for p in module.network.parameters()):
        raise RuntimeError(
            "The weights are sharded over several processes, so none of them can write the network. Save a checkpoint,"
            " and then: lightning-hift consolidate, lightning-hift export."
        )
    files = module.tokenizer_files if tokenizer is None else read_tokenizer_files(tokenizer)
    record = ExportRecord.of(module, files)
    # Detached, not copied: what is exported shares memory with the module until it is cast.
    return _write(record, module.network.state_dict(), Path(folder), dtype, merge, overwrite, max_shard_size)


def export_checkpoint(
    checkpoint: str,
    output: str,
    dtype: DType | None = None,
    merge: bool = False,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Convert a checkpoint of training to a folder that transformers opens, or peft, for an adapter.

    The weights are mapped into memory, not read as a whole, and optimizer state is not touched.

    Args:
        checkpoint: File that Lightning wrote while a module of ``lightning_hift.tasks`` was trained.
        output: Folder to write: weights, configuration, tokenizer, and a model card with the facts of the run.
        dtype: Of the weights that are written; default: as they are.
        merge: Work an adapter into the weights and write the whole model.
        overwrite: Replace what an earlier export wrote to ``output``.
        max_shard_size: Most bytes per file of weights, such as 5GB.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        FileExistsError: ``output`` is not empty, and ``overwrite`` is not set.
        ValueError: The file is no checkpoint, or one of another module; or its adapter cannot be merged.
    """
    _check_output(Path(output), overwrite)
    content = _read(Path(checkpoint))
    if EXPORT_KEY not in content or "state_dict" not in content:
        raise ValueError(
            f"Got checkpoint={checkpoint!r}, which does not say what network its weights belong to. Only checkpoints of"
            " modules of lightning_hift.tasks do; of another module, load it with load_from_checkpoint and save its"
            " network."
        )
    try:
        record = ExportRecord(**content[EXPORT_KEY])
    except TypeError as error:
        raise ValueError(
            f"Got checkpoint={checkpoint!r}, which another version of lightning_hift wrote. Export it with that one."
        ) from error
    weights = content["state_dict"]
    state = {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}
    del content, weights
    return _write(record, state, Path(output), dtype, merge, overwrite, max_shard_size)


def check_labels(saved: Mapping[str, Any], network: Any) -> None:
    """Refuse a network with other labels than those of a checkpoint's record: every prediction would be misnamed.

    Raises:
        ValueError: They differ, or their order does. (Not if one of the two has no names but ``LABEL_0`` and so on.)
    """
    there = list((json.loads(saved["config"]).get("id2label") or {}).values())
    here = list((getattr(network.config, "id2label", None) or {}).values())
    unnamed = [f"LABEL_{i}" for i in range(len(there))]
    if there != here and len(there) == len(here) and unnamed not in (there, here):
        other = "them in another order" if sorted(there) == sorted(here) else "others"
        raise ValueError(
            f"The checkpoint has the labels {', '.join(there)}, but this run has {other}: {', '.join(here)}. Give the"
            " checkpoint's order: label_names of the data module, or labels of the module."
        )


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(
            f"Got checkpoint={str(path)!r}, which is a folder. Make one file of a sharded checkpoint first:"
            f" lightning-hift consolidate --checkpoint {path} --output FILE"
        )
    if not path.is_file():
        raise FileNotFoundError(f"Got checkpoint={str(path)!r}, but there is no such file.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"Got checkpoint={str(path)!r}, which is truncated or no checkpoint of Lightning 2.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"Got checkpoint={str(path)!r}, which cannot be read without running code that it contains:"
            f" {str(error).strip().splitlines()[0]}"
        ) from error
    return content if isinstance(content, dict) else {}


# --- the folder -------------------------------------------------------------------------------------------------------


def _write(
    record: ExportRecord,
    state: Mapping[str, Tensor],
    folder: Path,
    dtype: DType | None,
    merge: bool,
    overwrite: bool,
    max_shard_size: str,
) -> Path:
    _check_output(folder, overwrite)
    network = _rebuild(record, state)
    if merge:
        network = _merge(network, record)
    if dtype is not None:
        network = network.to(getattr(torch, dtype))
    is_adapter = record.adapter is not None and not merge
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
        part = Path(made)
        if is_adapter:
            _save_adapter(network, record, part, max_shard_size)
        else:
            network.save_pretrained(part, max_shard_size=max_shard_size)
        for name, content in record.tokenizer.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(content)
        card = model_card(folder.resolve(), record.auto_class, record.facts, record.base, is_adapter)
        (part / "README.md").write_text(card, encoding="utf-8")
        _move(part, folder)
    return folder


def _rebuild(record: ExportRecord, state: Mapping[str, Tensor]) -> Any:
    """The network around the tensors of ``state``, none of which is copied."""
    import transformers

    fields = json.loads(record.config)
    config = transformers.AutoConfig.for_model(fields["model_type"]).from_dict(fields)
    with torch.device("meta"):
        network = getattr(transformers, record.auto_class).from_config(config)
    if record.generation_config is not None:
        generation = transformers.GenerationConfig.from_dict(json.loads(record.generation_config))
        generation._original_object_hash = hash(generation)  # published ones may break rules that transformers has now
        network.generation_config = generation
    base = network
    if record.adapter is not None:
        from peft import get_peft_config, get_peft_model

        network = get_peft_model(network, get_peft_config(json.loads(record.adapter)))
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"The weights do not fit {type(base).__name__} as its configuration describes it:"
            f" {str(error).strip().splitlines()[-1].strip()} Was the network changed after configure_model?"
        ) from error
    base.tie_weights()
    return network.eval()


def _adapter_as_json(network: Any) -> str:
    fields = network.active_peft_config.to_dict()
    if "prompt_tuning_init" in fields:
        fields["inference_mode"] = True  # or peft would go and get a tokenizer for a text that it begins with
    return json.dumps(fields, default=sorted)


def _merge(network: Any, record: ExportRecord) -> Any:
    if record.adapter is None:
        raise ValueError("Got merge, but there is no adapter in this network. Leave merge out.")
    if network.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"Got merge, but a {network.active_peft_config.peft_type.value} adapter is an input, not a change of"
            " weights, so it cannot be merged. Export it as an adapter, without merge."
        )
    # A plain merge would write into tensors that may be those of a living module.
    return network.merge_and_unload(safe_merge=True)


def _save_adapter(network: Any, record: ExportRecord, folder: Path, max_shard_size: str) -> None:
    adapter = network.active_peft_config
    adapter.base_model_name_or_path = record.base or _BASE
    network.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub
    (folder / "README.md").unlink(missing_ok=True)  # peft's own
    base = network.get_base_model() if adapter.is_prompt_learning else network.unload()
    if record.base is not None:
        base.config.save_pretrained(folder / _BASE)
    else:
        base.save_pretrained(folder / _BASE, max_shard_size=max_shard_size)  # it is nowhere else


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise FileExistsError(f"Got the folder {str(folder)!r} to write to, which is a file. Name a folder.")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"Got the folder {str(folder)!r} to write to, which is not empty. Name another one, or set overwrite."
        )


def _move(part: Path, folder: Path) -> None:
    """Put everything into ``folder``, in which weights of an earlier export would be taken for these."""
    folder.mkdir(exist_ok=True)
    for pattern in ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", f"{_BASE}/*.safetensors*"):
        for stale in folder.glob(pattern):
            stale.unlink()
    for path in sorted(part.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
