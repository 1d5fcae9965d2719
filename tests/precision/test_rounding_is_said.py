"""Weights in 16 bits without masters: it is said at the start, and the proof after the first sweep names the cause."""

import warnings

import pytest
import torch

from lightning_hift import HiFTCallback, HiFTStrategy
from tests.models import (
    Automatic,
    Net,
    adamw,
    as_published,
    assert_same_weights,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
)


def small_steps(parameters):
    return torch.optim.SGD(parameters, lr=1e-7)


def module_of(*dtypes, make_optimizer=small_steps):
    """Blocks in these dtypes, one after another, the rest in the first one."""
    module = Automatic(make_optimizer)
    module.net.to(dtypes[0])
    for block, dtype in zip(module.net.blocks, dtypes, strict=False):
        block.to(dtype)
    return module


class Mixed(Net):
    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x.to(block.up.weight.dtype))
        return self.head(self.norm(x.to(self.head.weight.dtype)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_callback_alone_says_that_there_are_no_masters(dtype, precision):
    with pytest.warns(
        UserWarning, match=rf"23 of 23 trainable parameters are {str(dtype)[6:]} .*strategy='hift'"
    ) as seen:
        trainer(callbacks=[as_published()]).fit(module_of(dtype), loader(6))
    assert sum("keeps no master weights" in str(each.message) for each in seen) == 1
    (proof,) = [str(each.message) for each in seen if "after the first sweep" in str(each.message)]
    assert "kept their value because 16 bits round their updates away" in proof
    assert "gradient of 0" not in proof


def test_some_parameters_in_16_bits():
    module = module_of(torch.float32, torch.bfloat16)
    module.net = Mixed()
    module.net.blocks[1].bfloat16()
    with pytest.warns(UserWarning, match=r"6 of 23 trainable parameters are bfloat16 \(net.blocks.1.norm.weight"):
        trainer(callbacks=[as_published()]).fit(module, loader(6))


def test_several_optimizers_get_one_warning():
    class Two(Automatic):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net.bfloat16()
            self.second = Net().bfloat16()

        def training_step(self, batch, batch_idx):
            for optimizer, net in zip(self.optimizers(), (self.net, self.second), strict=True):
                optimizer.zero_grad()
                self.manual_backward(next_token_loss(net, batch))
                optimizer.step()

        def configure_optimizers(self):
            return [adamw(self.net.parameters()), adamw(self.second.parameters())]

    with pytest.warns(UserWarning, match="46 of 46 trainable parameters are bfloat16") as seen:
        trainer(callbacks=[HiFTCallback()]).fit(Two(), loader(3))
    assert sum("keeps no master weights" in str(each.message) for each in seen) == 1


@pytest.mark.parametrize("mixed", [False, True])
def test_the_strategy_keeps_masters_in_any_precision(mixed):
    found = []
    for _ in range(2):
        net = Mixed()
        net.blocks[1].bfloat16() if mixed else net.bfloat16()
        found.append(net)
    module = Automatic()
    module.net = found[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*16 bits.*")
        run = trainer(strategy="hift")
        run.fit(module, loader(13))
    assert run.callbacks[0].engines[0].master_weights == "split"
    engine = attach_published(found[1], adamw(found[1].parameters()), master_weights="full")
    for batch in tokens(13):
        next_token_loss(found[1], batch).backward()
        engine.optimizer.step()
    assert_same_weights(*found)


@pytest.mark.parametrize("cause", ["rate", "tensor_rate", "gradient", "rounding"])
def test_the_proof_tells_rounding_from_other_causes(cause):
    model = Net().bfloat16()
    lr = {"rate": 0.0, "tensor_rate": torch.tensor(0.0), "rounding": torch.tensor(1e-7)}.get(cause, 1e-7)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    engine = attach_published(model, optimizer, master_weights="none")
    for batch in tokens(5):
        (next_token_loss(model, batch) * (cause != "gradient")).backward()
        engine.optimizer.step()
    report = engine.first_sweep_report()
    named = report.rounded if cause == "rounding" else report.unchanged
    assert len(named) > 12  # but for what began at 0 and has all of its range there
    assert not (report.unchanged if cause == "rounding" else report.rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_in_32_bits_or_has_masters_is_not_said_to_be_rounded(dtype):
    model = Net().to(dtype)
    engine = attach_published(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for batch in tokens(5):
        next_token_loss(model, batch).backward()
        engine.optimizer.step()
    report = engine.first_sweep_report()
    assert not report.rounded
    assert len(report.unchanged) == 23


def test_the_users_choice_is_not_commented():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no master weights.*")
        trainer(strategy=HiFTStrategy(master_weights="none")).fit(module_of(torch.bfloat16), loader(3))
        trainer(callbacks=[as_published()]).fit(module_of(torch.float32), loader(3))
