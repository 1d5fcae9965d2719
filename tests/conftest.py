import logging

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def quiet_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds stay in the test that sets them, and Lightning does not advertise."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    logging.getLogger("lightning.pytorch").propagate = True
