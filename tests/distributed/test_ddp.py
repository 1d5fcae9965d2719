"""Data parallel: several processes against one process on the joined batch."""

import os
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_hift import IST, HiFTDDPStrategy, HiFTStrategy, StreamingCheckpointIO
from tests.engine.test_missed_turns import Dropping
from tests.models import (
    VOCABULARY,
    WIDTH,
    Automatic,
    Manual,
    Net,
    ResumableLoader,
    Rows,
    as_published,
    tokens,
    trainer,
    weights,
)
from tests.processes import succeeded

ROWS = 6  # per process and batch

# Sums over the batch are made in another order: by one process over all rows, here first by each over its own.
TOLERANCE = 1e-6


def test_a_host_has_room_for_the_state_of_all_its_processes(monkeypatch):
    model = Automatic()
    strategy = HiFTDDPStrategy(
        parallel_devices=[torch.device("cpu")] * 3, cluster_environment=LightningEnvironment(), accelerator=None
    )
    strategy.model, strategy.optimizers = model, [torch.optim.AdamW(model.parameters())]
    state = 8 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("lightning_hift.planner.preflight.available_host_memory", lambda: 3 * state)
    strategy._check_memory(as_published())
    monkeypatch.setattr("lightning_hift.planner.preflight.available_host_memory", lambda: 3 * state - 1)
    with pytest.raises(RuntimeError, match="optimizer state of all groups, in 3 processes"):
        strategy._check_memory(as_published())


class MastersAtStart(pl.Callback):
    def on_train_start(self, run, module):
        (engine,) = next(c for c in run.callbacks if hasattr(c, "engines")).engines
        collected = engine.optimizer.state_dict()["hift"]["masters"]
        names = [name.removeprefix("net.") for name, _ in module.named_parameters()]
        self.masters = {names[i]: value.clone() for i, value in collected.items()}


def rows(steps, world):
    """A dataset of so many whole batches for so many processes."""
    return Rows(tokens(steps, ROWS * world))


def sgd(parameters):
    # Adam would turn the smallest difference of a small gradient into one of the size of the learning rate.
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def loader(dataset, world, rank):
    sampler = DistributedSampler(dataset, world, rank, shuffle=False) if world > 1 else None
    return DataLoader(dataset, batch_size=ROWS * (1 if world > 1 else 2), sampler=sampler)


def fit(strategy, world, module=Automatic, steps=11, count=None, make_module=None, callback=None, **options):
    """Train and return the weights, and what the strategy has sent at the last step."""
    model = (make_module or module)(sgd)
    run = trainer(
        strategy=strategy,
        devices=world,
        callbacks=[as_published(**(callback or {}))],
        use_distributed_sampler=False,
        **options,
    )
    dataset = rows(steps, 2) if count is None else torch.utils.data.Subset(rows(steps, 2), range(count))
    run.fit(model, loader(dataset, world, run.global_rank))
    return weights(model), run.callback_metrics.get("hift/sent_bytes")


def in_two(**options):
    return fit(HiFTDDPStrategy(check_every_n_steps=1), 2, **options)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=TOLERANCE, msg=name)


class WithLayerDropout(Automatic):
    """Each block is left out of half of the batches, in all processes alike."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.net = Dropping()


CASES = {
    "automatic": {},
    "layer_dropout": {"module": WithLayerDropout},
    "manual": {"module": Manual},
    "clipped": {"gradient_clip_val": 0.05},
    "accumulated": {"accumulate_grad_batches": 3},
    "random_order": {"callback": {"order": "random", "reshuffle": True}},
}


def run_case(name):
    return in_two(**CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_on_the_joined_batch(name, two):
    first, second = succeeded(two.run(run_case, name))
    expected, _ = fit(HiFTStrategy(), 1, **CASES[name])
    assert_close(first[0], expected)
    assert all(torch.equal(first[0][key], second[0][key]) for key in expected)


# --- ends of epochs, resume -------------------------------------------------------------------------------------------


def run_ragged():
    return in_two(count=56, max_epochs=2)


def test_a_ragged_last_batch(two):
    (found, _), _ = succeeded(two.run(run_ragged))
    expected, _ = fit(HiFTStrategy(), 1, count=56, max_epochs=2)  # 4 batches of 12, and one of 8
    assert_close(found, expected)


def run_until(path, steps, resumed=None, world=2):
    strategy = HiFTDDPStrategy(check_every_n_steps=1) if world > 1 else HiFTStrategy()
    model = Automatic(lambda p: torch.optim.AdamW(p, lr=0.01))
    run = trainer(
        strategy=strategy,
        devices=world,
        max_steps=steps,
        max_epochs=-1,
        callbacks=[as_published(order="random", reshuffle=True, seed=3)],
        use_distributed_sampler=False,
    )
    batches = tokens(13, ROWS * 2)
    mine = [batch[run.global_rank :: world] for batch in batches]
    held = ResumableLoader(mine)
    if resumed is not None:
        held.load_state_dict({"next": 7})
    run.fit(model, held, ckpt_path=resumed, weights_only=None if resumed is None else True)
    if path is not None:
        run.save_checkpoint(path)
    return weights(model)


def test_resumes_bit_for_bit_and_with_another_number_of_processes(two, tmp_path):
    whole = succeeded(two.run(run_until, None, 11))
    succeeded(two.run(run_until, tmp_path / "7.ckpt", 7))
    resumed = succeeded(two.run(run_until, None, 11, tmp_path / "7.ckpt"))
    for here, there in zip(whole, resumed, strict=True):
        assert all(torch.equal(here[name], there[name]) for name in here)
    alone = run_until(None, 11, tmp_path / "7.ckpt", world=1)
    for name, value in alone.items():
        # AdamW makes much of the small differences of sums in another order where a gradient is nearly zero.
        torch.testing.assert_close(value, whole[0][name], rtol=0, atol=1e-4)
    saved = torch.load(tmp_path / "7.ckpt", weights_only=True)
    assert len(saved["optimizer_states"][0]["state"]) == len(whole[0])


class Drawing(Automatic):
    """Draws from three sources of random numbers, in each process from others."""

    def training_step(self, batch, batch_idx):
        noise = torch.rand(()) + np.random.rand() + random.random()
        return super().training_step(batch, batch_idx) * (1 + 0.1 * noise)


def run_drawing(strategy, path=None, resumed=None):
    """Epochs of 5 steps over a shuffled loader; a checkpoint after each of the first 7."""
    rank = int(os.environ["LOCAL_RANK"])
    seed = 10 * (resumed is None) + rank
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    model = Drawing(sgd)
    writer = [] if path is None else [ModelCheckpoint(path, "{step}", every_n_train_steps=1, save_top_k=-1)]
    run = trainer(
        strategy=strategy,
        devices=2,
        callbacks=[as_published(), *writer],
        max_epochs=2,
        enable_checkpointing=bool(writer),
    )
    batches = DataLoader(rows(5, 2), batch_size=ROWS, shuffle=True)
    run.fit(model, batches, ckpt_path=resumed, weights_only=None if resumed is None else True)
    return weights(model)


@pytest.mark.parametrize("step", [3, 5, 7])
def test_each_process_goes_on_with_its_own_random_numbers(step, two, tmp_path):
    whole = succeeded(two.run(run_drawing, "hift_ddp", tmp_path))
    path = tmp_path / f"step={step}.ckpt"
    resumed = succeeded(two.run(run_drawing, "hift_ddp", None, path))
    for here, there in zip(whole, resumed, strict=True):
        assert all(torch.equal(here[name], there[name]) for name in here)


# --- gradients --------------------------------------------------------------------------------------------------------


class Branching(Automatic):
    """The second process leaves out the last block in some batches; nobody uses the spare layer."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.spare = torch.nn.Linear(4, 4)
        self.after = []

    def training_step(self, batch, batch_idx):
        blocks = self.net.blocks
        if self.trainer.global_rank == 1 and batch_idx % 2:
            self.net.blocks = blocks[:-1]
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self.net.blocks = blocks

    def on_after_backward(self):
        self.after.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})


def run_branching():
    model = Branching(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5))
    run = trainer(
        strategy=HiFTDDPStrategy(check_every_n_steps=1),
        devices=2,
        callbacks=[as_published(group_size=2, frozen=[])],
        use_distributed_sampler=False,
    )
    before = model.spare.weight.detach().clone()
    run.fit(model, loader(rows(8, 2), 2, run.global_rank))
    return model.after, torch.equal(before, model.spare.weight)


def test_a_parameter_that_one_process_does_not_use_counts_as_zero_there(two):
    (first, kept), (second, _) = succeeded(two.run(run_branching))
    assert kept  # without a gradient anywhere it is not stepped, so its weights do not decay
    assert [set(step) for step in first] == [set(step) for step in second]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)
    assert any("net.blocks.2.up.weight" in step for step in first)


def run_bytes(group_size):
    _, sent = in_two(callback={"group_size": group_size}, steps=3)
    return sent


def test_only_the_active_group_is_sent(two):
    sent = succeeded(two.run(run_bytes, 1))
    parameters = Net().blocks[1].parameters()  # of the third step
    assert sent == [sum(4 * p.numel() for p in parameters)] * 2


def run_sparse():
    class Sparse(Automatic):
        def __init__(self, make_optimizer):
            super().__init__(make_optimizer)
            self.net.embedding = torch.nn.Embedding(VOCABULARY, WIDTH, sparse=True)

    return in_two(make_module=Sparse)


def test_sparse_gradients_are_refused(two):
    for error in two.run(run_sparse):
        assert isinstance(error, RuntimeError)
        assert "sparse gradient, which cannot be averaged over processes" in str(error)


# --- precision --------------------------------------------------------------------------------------------------------


def run_precision(precision):
    return in_two(precision=precision)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_precisions(precision, two):
    (found, _), (other, _) = succeeded(two.run(run_precision, precision))
    expected, _ = fit(HiFTStrategy(), 1, precision=precision)
    for name in found:
        assert torch.equal(found[name], other[name])
        # Gradients of each process are rounded to 8 bits of mantissa before they are averaged.
        torch.testing.assert_close(found[name], expected[name], rtol=2**-6, atol=2e-3, msg=name)


def test_masters_are_those_of_the_first_process(two):
    for masters, expected in succeeded(two.run(run_masters)):
        assert masters.keys() == expected.keys()
        assert all(torch.equal(masters[name], expected[name]) for name in masters)


def run_masters():
    model = Automatic(sgd)
    rank = int(os.environ["LOCAL_RANK"])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(rank)  # another start in the second process
    run = trainer(
        strategy=HiFTDDPStrategy(master_weights="full"),
        devices=2,
        precision="bf16-true",
        max_steps=1,
        callbacks=[kept := MastersAtStart()],
    )
    run.fit(model, loader(rows(2, 2), 2, rank))
    return kept.masters, {name: p.detach().float() for name, p in Net().named_parameters()}


# --- what must not go unnoticed ---------------------------------------------------------------------------------------


def run_with_rank(what):
    rank = int(os.environ["LOCAL_RANK"])
    options = {"group_size": {"callback": {"group_size": 1 + rank}}}.get(what, {})
    if what == "learning rate":
        return in_two(make_module=lambda _: Automatic(lambda p: torch.optim.SGD(p, lr=0.1 * (1 + rank))))
    if what == "frozen":
        return in_two(callback={"frozen": ["net.head"]} if rank else {})
    return in_two(**options)


@pytest.mark.parametrize(
    ("what", "words"), [("group_size", "layer groups"), ("learning rate", "optimizers"), ("frozen", "parameters")]
)
def test_processes_that_differ_are_refused_at_the_start(what, words, two):
    for error in two.run(run_with_rank, what):
        assert isinstance(error, RuntimeError)
        assert f"Process 1 differs from process 0 in {words}" in str(error)


class Drifting(Automatic):
    def on_train_batch_end(self, *args):
        if self.trainer.global_rank == 1 and self.trainer.global_step == 4:
            with torch.no_grad():
                self.net.head.bias[0] += 1e-6


def run_drifting():
    return in_two(make_module=Drifting)


def test_a_run_whose_processes_come_apart_stops(two):
    for error in two.run(run_drifting):
        assert isinstance(error, RuntimeError)
        assert "After step 5 the processes have different weights in net.head.bias." in str(error)


def run_buffers():
    class Normed(Automatic):
        def __init__(self, make_optimizer):
            super().__init__(make_optimizer)
            self.norm = torch.nn.BatchNorm1d(WIDTH)
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(self.norm.running_mean.clone())
            out = self.norm(self.net.embedding(batch).flatten(0, 1))
            return super().training_step(batch, batch_idx) + out.square().mean()

    made = []
    in_two(make_module=lambda make: made.append(Normed(make)) or made[0])
    return made[0].seen


def test_buffers_are_those_of_the_first_process(two):
    first, second = succeeded(two.run(run_buffers))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[-1])


def run_observed():
    run_policy = {"policy": IST(num_blocks=1, steps_per_draw=2, importance_rate=2.0)}
    made = []

    class Seen(Automatic):
        def on_train_batch_end(self, *args):
            made.append(self.trainer.callbacks[0].active_group.index)

    in_two(make_module=Seen, callback=run_policy, steps=30)
    return made


def test_a_policy_that_learns_decides_the_same_everywhere(two):
    first, second = succeeded(two.run(run_observed))
    assert first == second
    assert len(set(first)) > 1


@pytest.mark.parametrize("strategy", [DDPStrategy, FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_would_go_wrong_name_the_one_to_use(strategy):
    run = trainer()
    run._accelerator_connector.strategy = strategy.__new__(strategy)
    run.strategy._checkpoint_io = StreamingCheckpointIO()
    with pytest.raises(MisconfigurationException, match=f"{strategy.__name__}.*strategy='hift_ddp' on several"):
        as_published().setup(run, Automatic(sgd), "fit")


def test_bad_arguments():
    with pytest.raises(ValueError, match="check_every_n_steps=-1"):
        HiFTDDPStrategy(check_every_n_steps=-1)
    with pytest.raises(ValueError, match="offload"):
        HiFTDDPStrategy(offload="tape")
