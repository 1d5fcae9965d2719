"""Host memory is page-locked before the first step, and copies need no page-locked memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hift import HiFTEngine, StateOffloader
from lightning_hift.engine.optimizer_state import parameters_of
from lightning_hift.engine.probe import StateBytes
from tests.models import Net, adamw, assert_same_weights, attach_published, next_token_loss, tokens

pytestmark = pytest.mark.device

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "split": {"master_weights": "split"},
    "full": {"master_weights": "full"},
    "slices": {"max_group_numel": 100},
}


def train(device: str, fused: bool = False, steps: int = 13, **options: Any) -> tuple[Net, HiFTEngine]:
    model = Net().to(device, torch.bfloat16 if "master_weights" in options else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True) if fused else adamw(model.parameters())
    engine = attach_published(model, optimizer, **options)
    for batch in tokens(steps):
        next_token_loss(model, batch.to(device)).backward()
        optimizer.step()
    return model.cpu(), engine


@pytest.fixture
def locked(softgpu, monkeypatch):
    """Bytes of each call."""
    found: list[int] = []
    runtime = softgpu.cudart()

    class Noting(runtime):  # type: ignore[misc, valid-type]
        @classmethod
        def cudaHostRegister(cls, address, nbytes, flags):
            found.append(nbytes)
            return runtime.cudaHostRegister(address, nbytes, flags)

    monkeypatch.setattr(softgpu, "cudart", lambda: Noting)
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_all_is_page_locked_before_the_first_step(options, fused, locked):
    shown = []
    _, engine = train(
        "softgpu",
        fused,
        steps=0,
        make_offloader=lambda: StateOffloader("softgpu", show_progress=lambda *each: shown.append(each)),
        **OPTIONS[options],
    )
    before = len(locked)
    assert shown == sorted(shown)
    assert shown[-1][0] == shown[-1][1] > 0
    model = Net()
    del engine
    locked.clear()
    _, engine = train("softgpu", fused, **OPTIONS[options])
    assert len(locked) == before  # and none in the steps
    assert sum(locked) >= engine.offloader.host_bytes - 4 * len(list(model.parameters()))


def test_what_was_reserved_in_vain_is_given_back(softgpu, monkeypatch):
    """The state is not what it was foretold to be."""
    foretold = lambda optimizer, dtype: {p: StateBytes(1) for p in parameters_of(optimizer)}  # noqa: E731
    monkeypatch.setattr("lightning_hift.engine.stepper.live_state_bytes", foretold)
    _, engine = train("softgpu", steps=0)
    assert engine.offloader._memory._reserved
    _, engine = train("softgpu", steps=7)
    assert not engine.offloader._memory._reserved


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_copies_without_page_locked_memory(options, staged, softgpu, monkeypatch):
    runtime = softgpu.cudart()

    class Refusing(runtime):  # type: ignore[misc, valid-type]
        @classmethod
        def cudaHostRegister(cls, address, nbytes, flags):
            return runtime.cudaHostRegister(address, nbytes, flags) if staged and nbytes == 512 else 1

    monkeypatch.setattr(softgpu, "cudart", lambda: Refusing)
    monkeypatch.setattr("lightning_hift.offload.staging._NBYTES", 512)
    expected, _ = train("cpu", **OPTIONS[options])
    with pytest.warns(UserWarning, match=r"Page-locked host memory was refused .*ulimit -l"):
        model, engine = train("softgpu", **OPTIONS[options])
    assert (engine.offloader._transfers._staging is not None) == staged
    assert_same_weights(model, expected)
