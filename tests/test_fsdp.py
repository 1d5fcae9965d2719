"""Sharded over several processes, against one process on the joined batch."""

import os

import pytest
import torch
from torch.distributed.tensor import DTensor

from lightning_hift import HiFTFSDPStrategy, HiFTStrategy
from tests.models import Automatic, Manual, ResumableLoader, Rows, as_published, tokens, trainer
from tests.processes import Processes
from tests.test_ddp import ROWS, TOLERANCE, assert_close, loader, rows, sgd, succeeded


@pytest.fixture(scope="module")
def two():
    processes = Processes(2)
    yield processes
    processes.close()


def whole(module):
    """All parameters, gathered from all processes."""
    return {
        name.removeprefix("net."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }


def fit(strategy, world, module=Automatic, steps=11, make_optimizer=sgd, callback=None, count=None, **options):
    model = module(make_optimizer)
    run = trainer(
        strategy=strategy,
        devices=world,
        callbacks=[as_published(**(callback or {}))],
        use_distributed_sampler=False,
        **options,
    )
    dataset = rows(steps, 2) if count is None else torch.utils.data.Subset(rows(steps, 2), range(count))
    run.fit(model, loader(dataset, world, run.global_rank))
    return whole(model)


CASES = {
    "automatic": {},
    "manual": {"module": Manual},
    "clipped": {"gradient_clip_val": 0.05},
    "accumulated": {"accumulate_grad_batches": 3},
    "random_order": {"callback": {"order": "random", "reshuffle": True}},
    "head_always_active": {"callback": {"always_active": ["net.head"]}},
}


def run_case(name):
    return fit(HiFTFSDPStrategy(), 2, **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_on_the_joined_batch(name, two):
    first, second = succeeded(two.run(run_case, name))
    assert_close(first, fit(HiFTStrategy(), 1, **CASES[name]))
    assert all(torch.equal(first[key], second[key]) for key in first)
