"""MeZO: against a plain twin, its noise, its mask, under HiFT, resumed, and what it refuses."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hift import HiFTCallback, HiFTStrategy, MeZO
from lightning_hift.engine.probe import live_state_bytes, state_bytes
from tests.models import (
    GROUPS,
    Automatic,
    Manual,
    Net,
    ResumableLoader,
    as_published,
    assert_same_weights,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
    weights,
)
from tests.reference.mezo import mezo_steps

OPTIONS = {"lr": 0.02, "eps": 1e-2}


def mezo(parameters: Any) -> MeZO:
    return MeZO(parameters, **OPTIONS)


# --- alone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"sparsity": 0.75}, {"sparsity": 0.5, "seed": 3}])
def test_equals_the_plain_twin(options: dict[str, Any]) -> None:
    options = {**OPTIONS, "weight_decay": 0.05, **options}
    model, twin, (batch,) = Net(), Net(), tokens(1)
    optimizer = MeZO(model.parameters(), **options)
    for _ in range(3):
        optimizer.step(lambda: next_token_loss(model, batch))
    mezo_steps(list(twin.parameters()), lambda: next_token_loss(twin, batch), 3, **options)
    assert_same_weights(model, twin)


def test_it_learns() -> None:
    model, (batch,) = Net(), tokens(1)
    optimizer = MeZO(model.parameters(), lr=0.01, eps=1e-2)  # at 0.02 rounding decides where it ends
    losses = [float(optimizer.step(lambda: next_token_loss(model, batch))) for _ in range(300)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_weights_are_moved_to_both_sides_by_the_same_noise_and_back() -> None:
    weight = nn.Parameter(torch.randn(50, 4))
    start, seen = weight.detach().clone(), []
    optimizer = MeZO([weight], lr=0.0, eps=0.5)

    def closure() -> Tensor:
        seen.append(weight.detach().clone())
        return weight.sum()

    optimizer.step(closure)
    torch.testing.assert_close(seen[0] - start, start - seen[1])
    torch.testing.assert_close(weight.detach(), start)
    noise = (seen[0] - start) / 0.5
    assert abs(noise.mean()) < 0.3
    assert abs(noise.std() - 1) < 0.2
    optimizer.step(closure)
    assert not torch.allclose(seen[2] - weight.detach(), seen[0] - start)  # each step draws its own


def test_only_the_smaller_weights_move_if_it_is_sparse() -> None:
    weight = nn.Parameter(torch.randn(100, 10))
    start = weight.detach().clone()
    MeZO([weight], lr=0.1, eps=1.0, sparsity=0.75).step(lambda: weight.square().sum())
    moved = weight != start
    assert moved.sum() == 250
    assert start[moved].abs().max() < start[~moved].abs().min()
    assert torch.equal(weight[~moved], start[~moved])


def test_both_sides_see_the_same_dropout_and_the_next_step_another() -> None:
    masks = []
    weight = nn.Parameter(torch.ones(64))

    def closure() -> Tensor:
        masks.append(nn.functional.dropout(torch.ones(64)) > 0)
        return weight.sum()

    optimizer = mezo([weight])
    for _ in range(2):
        optimizer.step(closure)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_autocast_does_not_remember_the_weights_of_the_other_side() -> None:
    model, (batch,) = Net(), tokens(1)
    losses: list[float] = []

    def closure() -> Tensor:
        losses.append(float(loss := next_token_loss(model, batch)))
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        MeZO(model.head.parameters(), lr=0.01, eps=0.5).step(closure)
    assert losses[0] != losses[1]


def test_frozen_parameters_neither_move_nor_have_state() -> None:
    model, (batch,) = Net(), tokens(1)
    model.embedding.requires_grad_(False)
    start = weights(model)
    optimizer = mezo(model.parameters())
    optimizer.step(lambda: next_token_loss(model, batch))
    assert torch.equal(model.embedding.weight, start["embedding.weight"])
    assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}


def test_no_loss_is_no_step_and_a_failure_leaves_the_weights_where_they_were() -> None:
    weight = nn.Parameter(torch.randn(8))
    start = weight.detach().clone()
    optimizer = mezo([weight])
    assert optimizer.step(lambda: None) is None
    assert len(optimizer.state) == 0

    def fail() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    torch.testing.assert_close(weight.detach(), start)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"eps": 0.0}, {"weight_decay": -0.1}, {"sparsity": 1.0}])
def test_bad_arguments(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="eps above 0, sparsity at least 0 and below 1"):
        MeZO([nn.Parameter(torch.ones(2))], **options)


def test_a_closure_is_needed_and_runs_no_backward_pass() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"MeZO needs step\(closure\)"):
        mezo([weight]).step()

    def with_gradient() -> Tensor:
        with torch.enable_grad():
            weight.sum().backward()
        return weight.sum()

    for closure in (with_gradient, lambda: weight.sum().backward()):
        with pytest.raises(RuntimeError, match="its closure runs a backward pass"):
            mezo([weight]).step(closure)


# --- in Lightning -----------------------------------------------------------------------------------------------------


def test_a_module_trains_by_it_without_gradients() -> None:
    module, twin = Manual(mezo), Net()
    fit = trainer()
    fit.fit(module, loader(4))
    assert fit.global_step == 4
    assert all(p.grad is None for p in module.parameters())
    for step, batch in enumerate(tokens(4)):
        mezo_steps(list(twin.parameters()), partial(next_token_loss, twin, batch), 1, first_step=step, **OPTIONS)
    assert_same_weights(module, twin)


def test_a_step_of_several_micro_batches_has_their_mean_loss() -> None:
    module, twin = Manual(mezo, accumulate_grad_batches=2), Net()
    fit = trainer()
    fit.fit(module, loader(5))
    assert fit.global_step == 3
    batches = tokens(5)
    for step in range(3):
        window = batches[2 * step : 2 * step + 2]

        def loss() -> Tensor:
            return torch.stack([next_token_loss(twin, batch) for batch in window]).sum() / 2  # noqa: B023

        mezo_steps(list(twin.parameters()), loss, 1, first_step=step, **OPTIONS)
    assert_same_weights(module, twin)


@pytest.mark.parametrize("strategy", ["auto", "hift"])
def test_automatic_optimization_ends_in_a_clear_error(strategy: str) -> None:
    module = Automatic(mezo)
    start = weights(module)
    with pytest.raises(RuntimeError, match="With Lightning, derive from HiFTModule"):
        trainer(strategy=strategy).fit(module, loader(1))
    for name, weight in weights(module).items():
        torch.testing.assert_close(weight, start[name])


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=8)


@pytest.mark.parametrize("hift", [False, True])
def test_a_resumed_run_is_one_that_was_never_interrupted(hift: bool, tmp_path: Path) -> None:
    def fit(steps: int, **options: Any) -> Manual:
        module = Manual(lambda parameters: MeZO(parameters, **OPTIONS, sparsity=0.3), schedule)
        callbacks = [as_published(always_active=["head"])] if hift else []
        run = trainer(max_epochs=-1, max_steps=steps, callbacks=callbacks)
        run.fit(module, ResumableLoader(tokens(8)), **options)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    fit(5)
    assert_same_weights(fit(8, ckpt_path=tmp_path / "5.ckpt"), fit(8))


# --- one group at a time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["auto", "hift"])
def test_one_group_of_hift_is_plain_mezo(strategy: str) -> None:
    plain, grouped = Manual(mezo), Manual(mezo)
    trainer().fit(plain, loader(4))
    trainer(strategy=strategy, callbacks=[as_published(group_size=100)]).fit(grouped, loader(4))
    assert_same_weights(plain, grouped)


@pytest.mark.parametrize("always", [[], ["head"]])
def test_each_step_moves_one_group(always: list[str]) -> None:
    class Watch(HiFTCallback):
        moved: list[set[str]] = []  # noqa: RUF012

        def on_train_batch_start(self, run: Any, each: Any, *args: Any) -> None:
            self.before = weights(each)
            super().on_train_batch_start(run, each, *args)

        def on_train_batch_end(self, run: Any, each: Any, *args: Any) -> None:
            super().on_train_batch_end(run, each, *args)
            self.moved.append({name for name, w in weights(each).items() if not torch.equal(w, self.before[name])})

    watch = Watch(1, "bottom2up", steps_per_group=1, always_active=always)
    trainer(callbacks=[watch]).fit(Manual(mezo), loader(5))
    groups = [set(group) for group in GROUPS]
    expected = [group | groups[-1] for group in groups[:-1]] if always else groups
    assert watch.moved[: len(expected)] == expected


def test_in_a_plain_loop() -> None:
    model, (batch,) = Net(), tokens(1)
    optimizer = mezo(model.parameters())
    engine = attach_published(model, optimizer)
    for group in GROUPS:
        before = weights(model)
        optimizer.step(lambda: next_token_loss(model, batch))
        assert {name for name, w in weights(model).items() if not torch.equal(w, before[name])} == set(group)
    engine.close()
    assert {entry["step"] for entry in optimizer.state_dict()["state"].values()} == {1}


def test_a_plan_knows_that_there_are_no_bytes_of_state() -> None:
    model = Net()
    assert {each.device + each.host for each in state_bytes(mezo, list(model.parameters()))} == {0}
    assert {each.device + each.host for each in live_state_bytes(mezo(model.parameters())).values()} == {0}


def test_masters_and_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="MeZO moves the weights that the forward pass reads"):
        trainer(precision="bf16-true", strategy=HiFTStrategy()).fit(Manual(mezo), loader(1))
    with pytest.raises(ValueError, match="MeZO does not compute the same for slices"):
        trainer(strategy=HiFTStrategy(max_group_numel=10)).fit(Manual(mezo), loader(1))


def test_weights_of_16_bits_without_masters() -> None:
    module = Manual(mezo)
    trainer(precision="bf16-true", strategy=HiFTStrategy(master_weights="none")).fit(module, loader(5))
    assert all(w.dtype == torch.bfloat16 and torch.isfinite(w).all() for w in weights(module).values())
