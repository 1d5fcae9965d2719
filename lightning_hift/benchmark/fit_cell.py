"""A run of the kind ``"fit"``: ``lightning-hift fit`` with some files and options, in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from lightning.pytorch.callbacks import Callback, Checkpoint
from typing_extensions import override

from lightning_hift.benchmark.kinds import Planned
from lightning_hift.cli import HiFTCLI, WarningsOnly
from lightning_hift.plugin.callback import find_callback
from lightning_hift.trainer import HiFTTrainer

_MORE_THAN_ANY = 10**6  # layer units
_QUIET = {
    "trainer.logger": False,
    "trainer.enable_checkpointing": False,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
}


class BenchmarkCLI(HiFTCLI):
    """Fits without writing checkpoints, whatever the configuration says."""

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        options = self.config.get(self.subcommand or "", self.config)["trainer"]
        given = options["callbacks"] or []
        listed = given if isinstance(given, list) else [given]
        options["callbacks"] = [callback for callback in listed if not _writes_checkpoints(callback)]


def run(configs: Sequence[str], options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fit, and return what ``RunMeasures`` found.

    Args:
        configs: Files for ``--config``.
        options: Settings by dotted key, which take precedence.
        folder: An empty one.
    """
    report = folder / "measures.json"
    measures = ["--trainer.callbacks+=lightning_hift.benchmark.RunMeasures", f"--trainer.callbacks.path={report}"]
    BenchmarkCLI(args=["fit", *_arguments(configs, options, folder), *measures])
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def plan(configs: Sequence[str], options: Mapping[str, Any], folder: Path) -> Planned:
    """Bytes at the peak, without a run."""
    arguments = _arguments(configs, {**options, "seed_everything": False}, folder)
    with WarningsOnly():
        cli = BenchmarkCLI(args=arguments, run=False)
    trainer, by_hift = cast(HiFTTrainer, cli.trainer), find_callback(cli.trainer) is not None
    full = {} if by_hift else {"group_size": _MORE_THAN_ANY, "offload": "none"}
    found = trainer.make_plan(cli.model, cli.datamodule, full, compare=False).forecast
    return {"device": found.peak, "host": found.host_bytes}


def _arguments(configs: Sequence[str], options: Mapping[str, Any], folder: Path) -> list[str]:
    settings = folder / "options.yaml"
    settings.write_text(yaml.safe_dump(_nested({**_QUIET, **options})))
    return [word for path in (*configs, str(settings)) for word in ("--config", path)]


def _writes_checkpoints(callback: Any) -> bool:
    if isinstance(callback, Callback):
        return isinstance(callback, Checkpoint)
    module, _, name = callback["class_path"].rpartition(".")
    return issubclass(getattr(import_module(module), name), Checkpoint)


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as mappings in mappings."""
    found: dict[str, Any] = {}
    for dotted, value in options.items():
        *path, last = dotted.split(".")
        place = found
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return found
