"""TrainOnly: what trains, what does not, when, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_hift import TrainOnly
from tests.models import (
    Automatic,
    Manual,
    Net,
    ResumableLoader,
    as_published,
    assert_same_weights,
    loader,
    tokens,
    trainer,
    weights,
)

HEAD = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
BIASES = {name for name, _ in Net().named_parameters() if name.endswith("bias")}


class Late(Automatic):
    """Its network is built in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Net()


def moved(module: pl.LightningModule, start: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, weight in weights(module).items() if not torch.equal(weight, start[name])}


@pytest.mark.parametrize("kind", [Automatic, Manual, Late])
@pytest.mark.parametrize("strategy", ["auto", "hift"])
@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["head"], HEAD),
        (["embedding"], {"embedding.weight"}),
        (["*bias"], BIASES),
        (["*bias", "head"], BIASES | HEAD),
        (["net.blocks.1.*", "*head.weight"], {"head.weight", *(n for n in weights(Net()) if "blocks.1" in n)}),
    ],
)
def test_only_what_matches_trains(kind: Any, strategy: str, patterns: list[str], expected: set[str]) -> None:
    module = kind()
    run = trainer(strategy=strategy, callbacks=[TrainOnly(patterns)], max_epochs=2)
    run.fit(module, loader(5))
    assert moved(module, weights(Net())) == expected
    names = {id(p): name.removeprefix("net.") for name, p in module.named_parameters()}
    (optimizer,) = run.optimizers
    state = optimizer.state_dict()["state"]
    owned = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert {owned[i] for i, entry in state.items() if entry} == expected
    assert all(p.requires_grad for p in module.parameters())
    assert "configure_optimizers" not in vars(module)


def test_hift_takes_turns_over_what_is_left() -> None:
    hift = as_published()
    trainer(callbacks=[hift, TrainOnly(["*bias"])]).fit(Automatic(), loader(5))
    assert [group.name for group in hift.groups] == ["net.blocks.0", "net.blocks.1", "net.blocks.2", "head"]
    assert {name.removeprefix("net.") for group in hift.groups for name in group.parameters} == BIASES


@pytest.mark.parametrize("hift", [False, True])
def test_a_resumed_run_trains_the_same(hift: bool, tmp_path: Path) -> None:
    def fit(steps: int, **options: Any) -> Automatic:
        module = Automatic()
        callbacks = [TrainOnly(["*bias", "head"]), *([as_published()] if hift else [])]
        run = trainer(max_epochs=-1, max_steps=steps, callbacks=callbacks)
        run.fit(module, ResumableLoader(tokens(8)), **options)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    fit(3)
    resumed = fit(7, ckpt_path=tmp_path / "3.ckpt")
    assert_same_weights(resumed, fit(7))
    assert moved(resumed, weights(Net())) == BIASES | HEAD


def test_a_module_keeps_what_it_froze_and_its_own_configure_optimizers() -> None:
    module = Automatic()
    module.net.embedding.requires_grad_(False)
    own = module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    for _ in range(2):
        trainer(callbacks=[TrainOnly(["head"])]).fit(module, loader(1))
        assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["net.embedding.weight"]
        assert module.configure_optimizers is own


def test_an_interrupted_fit_leaves_nothing_frozen() -> None:
    class Failing(Automatic):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            raise ArithmeticError

    module = Failing()
    with pytest.raises(ArithmeticError):
        trainer(callbacks=[TrainOnly(["head"])]).fit(module, loader(1))
    assert all(p.requires_grad for p in module.parameters())
    assert "configure_optimizers" not in vars(module)


def test_it_can_be_copied() -> None:
    assert copy.deepcopy(TrainOnly("head")).patterns == ["head"]


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="Got no patterns in TrainOnly"):
        TrainOnly([])
    message = r"'tail' in TrainOnly, .* units embedding, .*, head\. Parameters are named net\.head\.weight, "
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[TrainOnly(["head", "tail"])]).fit(Automatic(), loader(1))
