"""Layers that are replaced after layer groups were formed: it is said before the first batch."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_hift import HiFTStrategy
from tests.models import (
    VOCABULARY,
    WIDTH,
    Automatic,
    as_published,
    assert_same_weights,
    language_model,
    loader,
    trainer,
)

WORDS = "The module is not the one of which layer groups were formed"


class Replaces(Automatic):
    def replace(self, *args):
        self.net.head = nn.Linear(WIDTH, VOCABULARY)


@pytest.mark.parametrize("way", [{"callbacks": [as_published()]}, {"strategy": "hift"}], ids=["callback", "strategy"])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_a_new_head_is_named_before_the_first_batch(hook, way):
    seen = []

    class Late(Replaces):
        def training_step(self, batch, batch_idx):
            seen.append(any(WORDS in str(each.message) for each in caught))
            return super().training_step(batch, batch_idx)

    setattr(Late, hook, Late.replace)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(**way).fit(Late(), loader(3))
    assert seen == [True] * 3
    (words,) = [str(each.message) for each in caught if WORDS in str(each.message)]
    assert "net.head.weight, net.head.bias are trainable, but no optimizer holds them" in words
    assert "net.head.weight, net.head.bias are not in the module any more" in words
    assert "configure_model" in words


@pytest.mark.parametrize("hook", ["__init__", "configure_model"])
def test_nothing_is_said_of_what_was_replaced_in_time(hook):
    class Early(Replaces):
        pass

    if hook != "__init__":
        setattr(Early, hook, Early.replace)
    module = Early()
    if hook == "__init__":
        module.replace()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", WORDS)
        trainer(strategy="hift").fit(module, loader(3))


class Resizes(Automatic):
    """transformers gives the same parameter other memory."""

    def __init__(self, late=True):
        super().__init__()
        config = {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8}
        self.net, self.late = language_model("gpt2", config), late
        if not late:
            self.resize()

    def resize(self):
        torch.manual_seed(0)
        self.net.resize_token_embeddings(VOCABULARY + 3)

    def on_fit_start(self):
        if self.late:
            self.resize()

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch, labels=batch).loss


@pytest.mark.parametrize(
    "options",
    [{"strategy": "hift", "precision": "bf16-true"}, {"strategy": HiFTStrategy(max_group_numel=50)}],
    ids=["masters", "slices"],
)
def test_resized_embeddings_of_which_there_are_masters_or_slices(options):
    words = r"\['net.transformer.wte.weight'\] were resized after.*\(17, 8\), now \(20, 8\)"
    with pytest.raises(RuntimeError, match=words):
        trainer(**options).fit(Resizes(), loader(2))


def test_resized_embeddings_train_as_in_plain_lightning():
    found = []
    for late in (True, False):
        module = Resizes(late)
        trainer(callbacks=[as_published()]).fit(module, loader(9))
        found.append(module)
    assert_same_weights(*found)


def test_frozen_copies_and_frozen_layers_are_nothing_to_be_said():
    class Teaches(Automatic):
        def on_fit_start(self):
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    module = Teaches()
    module.net.blocks[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", WORDS)
        trainer(callbacks=[as_published(frozen=["net.embedding"])]).fit(module, loader(3))


def test_frozen_parameters_outside_of_the_module_are_not_refused():
    class Holds(Automatic):
        def __init__(self):
            super().__init__()
            self.outside = [nn.Parameter(torch.zeros(2), requires_grad=False)]

        def configure_optimizers(self):
            return torch.optim.AdamW([*self.parameters(), *self.outside], lr=0.01)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", WORDS)
        trainer(callbacks=[as_published()]).fit(Holds(), loader(3))
