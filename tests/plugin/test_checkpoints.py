"""Checkpoints that were written without training, or in a module of another name."""

import pytest

from lightning_hift.plugin.callback import find_callback
from tests.models import Automatic, Net, as_published, assert_same_weights, loader, trainer


@pytest.mark.parametrize("strategy", ["hift", "hift_ddp", "hift_fsdp"])
def test_written_without_training(strategy, tmp_path):
    model = Automatic()
    model.net = Net(seed=5)
    writer = trainer(strategy=strategy, callbacks=[as_published()])
    writer.strategy.connect(model)
    writer.save_checkpoint(tmp_path / "c.ckpt")
    assert not model._trainer

    expected, found = Automatic(), Automatic()
    expected.net = Net(seed=5)
    trainer(strategy=strategy, callbacks=[as_published()]).fit(expected, loader(3))
    run = trainer(strategy=strategy, callbacks=[as_published()])
    run.fit(found, loader(3), ckpt_path=tmp_path / "c.ckpt")
    assert run.global_step == 3
    assert_same_weights(found, expected)


@pytest.mark.parametrize("before", ["nothing", "validate"])
def test_plain_lightning_trains_from_what_was_written_without_training(before, tmp_path):
    model, found = Automatic(), Automatic()
    model.net = Net(seed=5)
    writer = trainer(strategy="hift")
    if before == "validate":
        writer.validate(model, loader(1), verbose=False)
    else:
        writer.strategy.connect(model)
    writer.save_checkpoint(tmp_path / "c.ckpt")
    trainer().fit(found, loader(3), ckpt_path=tmp_path / "c.ckpt")
    trainer().fit(model, loader(3))
    assert_same_weights(found, model)


def test_connecting_a_model_leaves_the_trainer_that_has_trained_it_alone(tmp_path):
    plain, model = trainer(), Automatic()
    plain.fit(model, loader(1))
    other = trainer(strategy="hift")
    other.strategy.connect(model)
    assert find_callback(plain) is None
