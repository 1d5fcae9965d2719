"""Processes that are killed: the others stop, no checkpoint is taken for whole, and a resumed run is the same."""

import os
import signal
import time
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch

from lightning_hift.engine import state_gathering
from tests.engine.test_state_partition import assert_equal, fit
from tests.processes import free_port, loaded_context, take_part

SECONDS = 60  # until the others must have given up
EVERY = 3  # steps


class Saves(pl.Callback):
    """Saves over the same file."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, run, *args):
        if run.global_step % EVERY == 0:
            run.save_checkpoint(self.path)


class DiesInAStep(pl.Callback):
    """Once its gradients are there, and before it has sent the weights that it steps."""

    def on_before_optimizer_step(self, run, *args):
        if run.global_rank == 1 and run.global_step == 7:
            _die()


class DiesInASave(pl.Callback):
    """In the middle of sending its state, the second time."""

    def on_train_batch_end(self, run, *args):
        if run.global_rank == 1 and run.global_step == 2 * EVERY - 1:
            send, sent = state_gathering.dist.send, []

            def send_some(*arguments, **options):
                if len(sent) == 3:
                    _die()
                sent.append(send(*arguments, **options))

            state_gathering.dist.send = send_some


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _work(rank, port, folder, options):
    take_part(rank, 2, port)
    dies = [options["dies"]()] if "dies" in options else []
    resumed = {key: options[key] for key in ("resumed", "position") if key in options}
    try:
        weights, *_ = fit(
            options.get("partition_state", True),
            callbacks=[*dies, Saves(folder / "c.ckpt")],
            strategy={"timeout": timedelta(seconds=SECONDS)},
            default_root_dir=str(folder),
            **resumed,
        )
        torch.save(weights, folder / f"weights-{rank}.pt")
    except RuntimeError as error:
        (folder / f"error-{rank}.txt").write_text(str(error))


def start(folder, **options):
    folder.mkdir(exist_ok=True)
    port = free_port()
    processes = [loaded_context().Process(target=_work, args=(rank, port, folder, options)) for rank in (0, 1)]
    for process in processes:
        process.start()
    return processes


def finish(folder, **options):
    """Run to the end, and return the weights."""
    for process in start(folder, **options):
        process.join(4 * SECONDS)
        assert process.exitcode == 0
    return [torch.load(folder / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("faults") / "whole")[0]


@pytest.mark.parametrize(
    ("dies", "partition_state", "saved"),
    [(DiesInAStep, True, 2 * EVERY), (DiesInAStep, False, 2 * EVERY), (DiesInASave, True, EVERY)],
)
def test_the_other_process_stops_and_the_last_checkpoint_goes_on(dies, partition_state, saved, expected, tmp_path):
    survivor, killed = start(tmp_path / "run", dies=dies, partition_state=partition_state)
    killed.join(4 * SECONDS)
    assert killed.exitcode == -signal.SIGKILL
    since = time.monotonic()
    survivor.join(2 * SECONDS)
    assert not survivor.is_alive()
    assert time.monotonic() - since < SECONDS
    assert (tmp_path / "run" / "error-0.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["c.ckpt", "error-0.txt"]

    checkpoint = tmp_path / "run" / "c.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == saved
    for weights in finish(tmp_path / "resumed", resumed=checkpoint, position=saved):
        assert_equal(weights, expected)
