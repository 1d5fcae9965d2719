"""Imports go down only, and light users stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_hift

PACKAGE = Path(lightning_hift.__file__).parent
OWN = "lightning_hift."
FLOORS = [
    {"groups", "offload", "precision", "table"},
    {"engine", "activations", "planner"},
    {"plugin", "distributed", "huggingface", "fabric", "packaged_optimizers"},
    {"tasks", "data"},
    {"cli", "trainer"},
    {"benchmark"},
    {"__main__"},
]
TORCH_ONLY = {"torch", "lightning_hift"}
# Imported where they are used, for those who have them: to draw a plan, to plan a network of transformers, and to go on
# with NumPy's random numbers.
OPTIONAL = {
    ("planner.plot", "matplotlib"),
    ("planner.made_up_batch", "transformers"),
    ("engine.random_state", "numpy"),
}


def files():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def dotted(path):
    """A file's name as it is imported, without that of the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room(name):
    return name.split(".")[0]


def floor_of(name):
    return next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)


NAMES = {dotted(path) for path in files()}


def imported(path):
    """(module, at the top level) of each import in a file, also within functions, with modules spelled out."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner.removeprefix(OWN) in NAMES else node.module), id(node) in top


def arrows(shown=lambda name: name):
    """What imports what in the package."""
    graph = {shown(name): set() for name in NAMES}
    for path in files():
        here = shown(dotted(path))
        graph[here] |= {shown(m.removeprefix(OWN)) for m, _ in imported(path) if m.startswith(OWN)} - {here}
    return graph


def circles(graph):
    """Sets of names each of which can be reached from each other one."""
    reached = {}
    for start in graph:
        seen, ahead = set(), [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        reached[start] = seen
    return sorted({tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]})


def test_every_file_has_a_floor():
    assert set(map(room, NAMES)) == set.union(*FLOORS)


def test_every_folder_says_what_lives_there():
    for folder in sorted(path.parent for path in PACKAGE.rglob("*.py")):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_few_files_lie_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("path", files(), ids=dotted)
def test_imports_go_down(path):
    here = dotted(path)
    for module, _ in imported(path):
        if module.startswith(OWN):
            there = module.removeprefix(OWN)
            assert floor_of(there) <= floor_of(here), f"{here} imports {module} from a floor above"
            assert room(there) != "benchmark" or room(here) in ("benchmark", "__main__")
        assert module != "lightning_hift", f"{here} imports the face of the package"


def test_no_file_imports_itself_by_way_of_others():
    assert circles(arrows()) == []


def test_no_room_imports_itself_by_way_of_others():
    assert circles(arrows(room)) == []


def test_circles_are_found():
    chain = {"a": {"b"}, "b": {"c"}, "c": set()}
    assert circles(chain) == []
    assert circles(chain | {"c": {"b"}, "d": {"a", "e"}, "e": {"d"}}) == [("b", "c"), ("d", "e")]


@pytest.mark.parametrize("path", [p for p in files() if floor_of(dotted(p)) < 2], ids=dotted)
def test_lower_floors_need_only_torch(path):
    for module, at_top in imported(path):
        name = module.split(".")[0]
        if at_top or (dotted(path), name) not in OPTIONAL:
            assert name in TORCH_ONLY | set(sys.stdlib_module_names), f"{dotted(path)} imports {module}"


@pytest.mark.parametrize("path", files(), ids=dotted)
def test_heavy_packages_are_imported_lazily(path):
    lazy = {
        "transformers",
        "accelerate",
        "peft",
        "datasets",
        "bitsandbytes",
        "torchao",
        "galore_torch",
        "matplotlib",
        "tensorboard",
    }
    for module, at_top in imported(path):
        assert not (at_top and module.split(".")[0] in lazy), f"{path.name} imports {module} at the top"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_the_package_brings_in_neither_transformers_nor_lightning():
    result = run("import sys, lightning_hift; print({'transformers', 'accelerate', 'lightning'} & set(sys.modules))")
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
