"""Data parallel: several processes against one process on the joined batch."""

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_hift import HiFTDDPStrategy, HiFTStrategy
from tests.models import Automatic, Manual, Rows, as_published, tokens, trainer, weights
from tests.processes import Processes

ROWS = 6  # per process and batch

# Sums over the batch are made in another order: by one process over all rows, here first by each over its own.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def two():
    processes = Processes(2)
    yield processes
    processes.close()


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
    return weights(model), getattr(run.strategy, "sent_bytes", None)


def in_two(**options):
    return fit(HiFTDDPStrategy(check_every_n_steps=1), 2, **options)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=TOLERANCE, msg=name)


CASES = {
    "automatic": {},
    "manual": {"module": Manual},
    "clipped": {"gradient_clip_val": 0.05},
    "accumulated": {"accumulate_grad_batches": 3},
    "random_order": {"callback": {"order": "random", "reshuffle": True}},
}


def run_case(name):
    return in_two(**CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_on_the_joined_batch(name, two):
    first, second = two.run(run_case, name)
    if isinstance(first, BaseException):
        raise first
    expected, _ = fit(HiFTStrategy(), 1, **CASES[name])
    assert_close(first[0], expected)
    assert all(torch.equal(first[0][key], second[0][key]) for key in expected)
