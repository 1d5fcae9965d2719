"""Modules and hooks that write to weights in 16 bits: with whole masters and with remainders it comes to the same."""

import pytest
import torch
from torch import nn

from lightning_hift import HiFTStrategy
from tests.models import (
    VOCABULARY,
    WIDTH,
    Automatic,
    Manual,
    Net,
    adamw,
    assert_same_weights,
    attach_published,
    loader,
    next_token_loss,
    tokens,
    trainer,
    weights,
)


class MaxNorm(Net):
    """Rows of its embedding are shortened in the forward pass, whoever trains, and in evaluation."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, max_norm=1.0)


class Clips(Net):
    def forward(self, tokens):
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.3, 0.3)
        return super().forward(tokens)


class Normalizes(Net):
    """Through ``.data``, of which torch keeps no count; one of the weights gets other memory."""

    def forward(self, tokens):
        for block in self.blocks:
            block.up.weight.data.div_(block.up.weight.data.norm() / 2)
            block.down.weight.data = block.down.weight.data.clamp(-0.2, 0.2)
        return super().forward(tokens)


class Prunes(Net):
    def forward(self, tokens):
        with torch.no_grad():
            for block in self.blocks:
                block.up.weight[::3] = 0
                block.down.weight[0] = -0.0
        return super().forward(tokens)


class Follows(Net):
    """Its first block is a moving average of the second one."""

    def forward(self, tokens):
        with torch.no_grad():
            for mean, p in zip(self.blocks[0].parameters(), self.blocks[1].parameters(), strict=True):
                mean.lerp_(p, 0.5)
        return super().forward(tokens)


WRITERS = [MaxNorm, Clips, Normalizes, Prunes, Follows]


@pytest.mark.parametrize("numel", [None, 60])
@pytest.mark.parametrize("net", WRITERS)
def test_modules_that_write_to_their_weights(net, numel):
    found = []
    for mode in ("full", "split"):
        torch.manual_seed(0)
        model = net()
        engine = attach_published(
            model,
            adamw(model.parameters()),
            master_weights=mode,
            weights_dtype=torch.bfloat16,
            max_group_numel=numel,
            always_active=["head"],
        )
        for batch in tokens(14):
            next_token_loss(model, batch).backward()
            engine.optimizer.step()
            model.eval()
            with torch.no_grad():
                next_token_loss(model, batch)
            model.train()
        found.append(model)
    assert_same_weights(*found)
    if net is MaxNorm:
        with torch.no_grad():
            model.embedding(torch.arange(VOCABULARY))
        assert (model.embedding.weight.float().norm(dim=1) < 1.01).all()


@pytest.mark.parametrize("kind", [Automatic, Manual])
@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_after_backward", "on_train_batch_end"])
def test_hooks_that_write_to_weights(hook, kind):
    class Edits(kind):
        def edit(self, *args):
            with torch.no_grad():
                for p in self.parameters():
                    p.clamp_(-0.25, 0.25)

    setattr(Edits, hook, Edits.edit)
    found = []
    for mode in ("full", "split"):
        module = Edits()
        trainer(strategy=HiFTStrategy(master_weights=mode), precision="bf16-true").fit(module, loader(13))
        found.append(module)
    assert_same_weights(*found)
    assert max(p.abs().max() for p in found[0].parameters()) < 0.27  # the step comes after some of the hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [None, 60])
def test_no_edit_of_a_forward_pass_is_lost(dtype, numel):
    """Where nothing is to be learned, what the module has written is what stays."""
    model = Normalizes().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = attach_published(model, optimizer, max_group_numel=numel)
    for batch in tokens(11):
        next_token_loss(model, batch).backward()
        written = weights(model)
        engine.optimizer.step()
        assert_same_weights(model, written)
