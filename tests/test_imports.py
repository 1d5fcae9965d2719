"""Imports go down only, and light users stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_hift

PACKAGE = Path(lightning_hift.__file__).parent
FLOORS = [
    {"schedule", "forward_order", "unit_search", "grouping", "fingerprint", "proof", "report", "table", "random_state"}
    | {"offload", "transfers", "host_memory", "state_tree", "master_weights", "row_slices"}
    | {"optimizer_twin", "optimizer_checks", "stepped_options", "activations", "reentrant"}
    | {"allocations", "memory", "probe"}
    | {"selection", "policies", "drawn_blocks", "lr_scale", "lr_forecast", "turns", "sharded_tensors"},
    {
        "engine",
        "attach",
        "gradient_sync",
        "gradient_use",
        "state_partition",
        "state_gathering",
        "lending",
        "optimizer_state",
        "lr_scheduler",
        "checkpointing",
        "preflight",
        "mezo",
    },
    {
        "callback",
        "run_length",
        "late_value",
        "state_housing",
        "strategy",
        "ddp_strategy",
        "fsdp_strategy",
        "several_processes",
        "sharding",
        "sharded_checkpoint",
        "agreement",
        "precision",
        "module",
        "checkpoint_io",
        "registration",
    }
    | {"trainable", "packaged_optimizers", "predictions", "training_speed", "layer_updates", "layer_updates_plot"},
    {"tasks", "data"},
    {"planner"},
    {"cli", "trainer"},
    {"benchmark"},
    {"__main__"},
]
TORCH_ONLY = {"torch", "lightning_hift"}
FACE = "__init__"


def files():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(name):
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def imported(path):
    """(module, at the top level) of each import in a file, with modules spelled out."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield node.module, id(node) in top


def test_every_file_has_a_floor():
    assert {room(path) for path in files()} <= set.union(*FLOORS)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = floor_of(room(path))
    for module, _ in imported(path):
        if module.startswith("lightning_hift."):
            there = module.split(".")[1]
            assert floor_of(there) <= here, f"{path.name} imports {module} from a floor above"
            assert there != "benchmark" or room(path) in ("benchmark", "__main__")
        assert module != "lightning_hift", f"{path.name} imports the face of the package"


@pytest.mark.parametrize("path", [p for p in files() if floor_of(room(p)) < 2], ids=lambda path: path.name)
def test_lower_floors_need_only_torch(path):
    for module, _ in imported(path):
        name = module.split(".")[0]
        assert name in TORCH_ONLY | set(sys.stdlib_module_names), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_lazily(path):
    lazy = {"transformers", "peft", "datasets", "bitsandbytes", "torchao", "galore_torch", "matplotlib", "tensorboard"}
    for module, at_top in imported(path):
        assert not (at_top and module.split(".")[0] in lazy), f"{path.name} imports {module} at the top"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_the_package_brings_in_neither_transformers_nor_lightning():
    result = run("import sys, lightning_hift; print({'transformers', 'lightning'} & set(sys.modules))")
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import lightning_hift; import lightning.pytorch as pl",
        # Lightning first, as in all the other tests; and within the package, after it has begun to wait for that.
        pytest.param("import lightning.pytorch as pl; import lightning_hift", marks=pytest.mark.slow),
        pytest.param("from lightning_hift import HiFTModule; import lightning.pytorch as pl", marks=pytest.mark.slow),
        pytest.param(
            "from lightning_hift.plugin.callback import HiFTCallback; import lightning.pytorch as pl",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_strategy_is_registered_whatever_is_imported_first(imports):
    result = run(f"{imports}; print(pl.Trainer(strategy='hift', accelerator='cpu', logger=False).strategy)")
    assert "HiFTStrategy object" in result.stdout, result.stderr


def test_face_is_sorted_and_complete():
    assert lightning_hift.__all__ == sorted(lightning_hift.__all__)
    assert all(getattr(lightning_hift, name) is not None for name in lightning_hift.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightning_hift.nothing
