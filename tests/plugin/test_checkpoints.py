"""Checkpoints that were written without training, or in a module of another name."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_hift.engine.engine import attach_engines
from lightning_hift.plugin.callback import find_callback
from tests.models import (
    Automatic,
    Net,
    ResumableLoader,
    adamw,
    as_published,
    assert_same_weights,
    loader,
    next_token_loss,
    published,
    tokens,
    trainer,
)


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


class Linear(pl.LightningModule):
    """One layer, which the whole module is the only layer unit of."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Renamed(Linear):
    pass


class Subclass(Automatic):
    pass


class UnderAnotherName(Automatic):
    """As it takes checkpoints of ``Automatic``, whose network is called ``net``."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"network": self.net})
        del self.net

    def on_load_checkpoint(self, checkpoint):
        saved = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"inner.network.{name.removeprefix('net.')}": p for name, p in saved.items()}

    def training_step(self, batch, batch_idx):
        return next_token_loss(self.inner["network"], batch)


class Recomputed(Automatic):
    def __init__(self):
        super().__init__()
        for i, block in enumerate(self.net.blocks):
            self.net.blocks[i] = checkpoint_wrapper(block)


@pytest.mark.parametrize(
    ("first", "second"),
    [(Linear, Renamed), (Automatic, Subclass), (Automatic, UnderAnotherName), (Automatic, Recomputed)],
)
@pytest.mark.parametrize("way", [{"strategy": "hift"}, {}])
def test_a_module_with_the_same_parameters_resumes(first, second, way, tmp_path):
    batches = list(torch.ones(4, 2, 4)) if first is Linear else tokens(4)

    def fit(module, path=None):
        saver = ModelCheckpoint(tmp_path, "c", every_n_train_steps=3, save_top_k=0 if path else 1)
        run = trainer(**way, callbacks=[as_published(), saver], enable_checkpointing=True, max_steps=6, max_epochs=-1)
        run.fit(module, ResumableLoader(batches), ckpt_path=path)
        return module.parameters()

    for a, b in zip(fit(first()), fit(second(), tmp_path / "c.ckpt"), strict=True):
        assert torch.equal(a, b)


def attached(net, optimizers=1):
    """The engines of a network, or of its parts."""
    parts = [net] if optimizers == 1 else list(net.children())
    return attach_engines(net, [adamw(part.parameters()) for part in parts], **published({}))


def test_parts_of_a_model_are_not_mixed_up():
    saved, (_, other) = (attached(nn.ModuleDict({"a": Net(), "b": Net()}), 2) for _ in range(2))
    with pytest.raises(ValueError, match=r"units: 'embedding' .*\(a.embedding.weight .* against b.embedding.weight"):
        other.optimizer.load_state_dict(saved[0].optimizer.state_dict())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(8, 4)), r"\(1.weight \[4, 4\] against 1.weight \[4, 8\]\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)), r"\(1.bias \[4\] against nothing\)"),
    ],
)
def test_other_parameters_are_refused(other, message):
    (engine,) = attached(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    (resumed,) = attached(other)
    saved = engine.optimizer.state_dict()
    saved["param_groups"][0]["params"] = resumed.optimizer.state_dict()["param_groups"][0]["params"]
    with pytest.raises(ValueError, match=message):
        resumed.optimizer.load_state_dict(saved)


def test_a_checkpoint_with_names_alone_still_resumes():
    (engine,), (other,) = attached(Net()), attached(Net())
    saved = engine.optimizer.state_dict()
    del saved["hift"]["root"]
    saved["hift"]["units"] = [(name, list(shapes)) for name, shapes in saved["hift"]["units"]]
    saved["hift"]["step"] = 3
    other.optimizer.load_state_dict(saved)
    assert other.step == 3
    saved["hift"]["units"][0] = ("embedding", ["other.weight"])
    with pytest.raises(ValueError, match=r"'embedding' against 'embedding' \(other.weight None"):
        other.optimizer.load_state_dict(saved)
