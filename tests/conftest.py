import logging
from collections.abc import Iterator

import pytest
import torch

from tests.processes import Processes

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def quiet_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds stay in the test that sets them, and Lightning does not advertise."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    logging.getLogger("lightning.pytorch").propagate = True


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
