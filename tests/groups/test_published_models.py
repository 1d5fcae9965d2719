"""Models of timm and diffusers at their published sizes, and all code of theirs and of transformers."""

from __future__ import annotations

import importlib
import pkgutil
import re
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
from torch import nn

from lightning_hift.groups.forward_order import members_in_forward_order
from lightning_hift.groups.grouping import LayerUnit, find_layer_units
from lightning_hift.groups.source_uses import read_uses
from tests.groups.published_models import TABLE, models, row

pytestmark = pytest.mark.slow


def package(name: str) -> ModuleType:
    """A library, or a skip where it, or what it needs, cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision for another torch: "operator nms does not exist"
        pytest.skip(f"{name}: {error}")


def can_be_divided(model: nn.Module, unit: LayerUnit) -> bool:
    """Whether two parts that count have both several layers with weights, and norms; an embedding never can."""
    if unit.name == "embedding":
        return False
    parts: list[str] = []
    for path, module in model.named_modules():
        layers = [m for m in module.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))]
        has_norm = any("norm" in type(m).__name__.lower() for m in module.modules())
        is_inside = any(path == top or path.startswith(f"{top}.") for top in unit.modules)
        counts = sum(p.numel() for p in module.parameters()) > 0.1 * unit.numel
        if is_inside and len(layers) > 1 and has_norm and counts:
            parts.append(path)
    innermost = [a for a in parts if not any(b.startswith(f"{a}.") for b in parts)]
    return len(innermost) > 1


@pytest.mark.parametrize("library", ["timm", "diffusers"])
def test_no_unit_is_too_large_that_could_be_divided(library: str) -> None:
    version = package(library).__version__
    section = TABLE.read_text().split(f"## {library} ")[1].split("\n## ")[0]
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section, re.M)]
    found = []
    for name, model in models(library):
        units = find_layer_units(model)
        assert sorted(id(p) for u in units for p in u.parameters.values()) == sorted(id(p) for p in model.parameters())
        total = sum(unit.numel for unit in units)
        too_large = [unit.name for unit in units if unit.numel > 0.3 * total and can_be_divided(model, unit)]
        assert not too_large, name
        found.append(row(name, units))
    if section.startswith(version):
        assert written[2:] == found


def classes(library: ModuleType) -> Iterator[type[nn.Module]]:
    """All modules in the sense of torch that a library defines."""
    for info in pkgutil.walk_packages(library.__path__, f"{library.__name__}."):
        if ".modeling_" in info.name or ".models." in info.name or ".layers." in info.name:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    module = importlib.import_module(info.name)
            except Exception:  # needs what is not installed
                continue
            own = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module)]
            yield from (cls for cls in own if cls.__module__ == info.name)


@pytest.mark.parametrize("library", ["transformers", "timm", "diffusers"])
def test_any_forward_of_a_library_can_be_read(library: str) -> None:
    read = 0
    for cls in classes(package(library)):
        uses, problem = read_uses(cls)
        assert not problem, cls
        read += bool(uses)
    assert read > 500


@pytest.mark.parametrize("library", ["timm", "diffusers"])
def test_each_module_of_a_model_has_an_order(library: str) -> None:
    package(library)
    for _, model in models(library):
        for module in {type(m): m for m in model.modules()}.values():
            expected = {*module._parameters, *module._modules}
            found = {name for name, _ in members_in_forward_order(module)}
            assert found == {name for name in expected if getattr(module, name) is not None}
