import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch and transformers look: the models are tiny, threads would only wait for each other; and none is fetched.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import pytest
import torch

from tests.processes import Processes

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a run sets does not reach the tests after it: with a rank, Lightning waits for others to start the rest."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def quiet_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds stay in the test that sets them, and Lightning does not advertise."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    logging.getLogger("lightning.pytorch").propagate = True


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[[list[str], Path], str]:
    """Runs a command in a folder: ``lightning-hift``, or a script there, with its arguments.

    In this process, which has imported already what a new one takes seconds for. Returns what was logged, and then
    what was printed.
    """
    from lightning_hift.__main__ import main

    def run(words: list[str], folder: Path) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", list(words))
        capsys.readouterr()
        caplog.clear()
        if words[0] == "lightning-hift":
            main()
        else:
            runpy.run_path(str(folder / words[0]), run_name="__main__")
        return caplog.text + capsys.readouterr().out

    return run


@pytest.fixture
def runs_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The runs of benchmarks get no processes of their own."""
    from lightning_hift.benchmark.cell_process import run_cell
    from lightning_hift.benchmark.runner import Runner

    def in_process(self: Any, cell: Any) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", sys.argv[:1])
        return run_cell(self.benchmark.kind, cell.configs, cell.options, tmp_path_factory.mktemp("run"))

    monkeypatch.setattr(Runner, "_in_process", in_process)


@pytest.fixture
def torchao_uncompiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """torchao compiles its step for each shape, which takes seconds and is tested once."""
    if "torchao" not in request.node.name or request.node.originalname == "test_compiled_step":
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def three() -> Iterator[Processes]:
    processes = Processes(3)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    processes = Processes(4)
    yield processes
    processes.close()
