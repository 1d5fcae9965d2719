"""Callbacks of Lightning beside HiFT's."""

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from tests.models import Automatic, Block, as_published, loader, trainer

WAYS_IN = {"strategy": lambda: {"strategy": "hift"}, "callback": lambda: {"callbacks": [as_published()]}}


class OwnFinetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net.embedding)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.embedding, optimizer)


class OwnBackboneFinetuning(BackboneFinetuning):
    pass


@pytest.mark.parametrize("way", ["strategy", "callback"])
@pytest.mark.parametrize("kind", [BackboneFinetuning, OwnBackboneFinetuning, OwnFinetuning])
@pytest.mark.parametrize("from_module", [False, True])
def test_callbacks_that_unfreeze_later_are_refused_at_once(way, kind, from_module):
    class Module(Automatic):
        @property
        def backbone(self):
            return self.net.embedding

        def configure_callbacks(self):
            return [kind()] if from_module else []

        def training_step(self, batch, batch_idx):
            raise AssertionError("training has begun")

    options = WAYS_IN[way]()
    callbacks = [*([] if from_module else [kind()]), *options.pop("callbacks", [])]
    with pytest.raises(MisconfigurationException, match=rf"^{kind.__name__} freezes layers and adds .*TrainOnly"):
        trainer(**options, callbacks=callbacks).fit(Module(), loader(2))
    trainer(**options, callbacks=callbacks).validate(Module(), loader(2), verbose=False)


@pytest.mark.parametrize(
    "finder", [LearningRateFinder(num_training_steps=12), BatchSizeFinder(max_trials=2, steps_per_trial=10)]
)
def test_finders_pass_over_a_layer_that_the_loss_does_not_reach(finder, tmp_path):
    class Unused(Automatic):
        def __init__(self):
            super().__init__()
            self.lr, self.batch_size = 0.01, 2
            self.net.spare = nn.ModuleList([Block()])

        def train_dataloader(self):
            return loader(12, self.batch_size)

        def val_dataloader(self):
            return loader(1)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    run = trainer(strategy="hift", callbacks=[as_published(), finder], max_epochs=2, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match=r"net.spare.0.*frozen=\[...\]"):  # in the run itself, which is after it
        run.fit(Unused())
    if isinstance(finder, LearningRateFinder):
        assert len(finder.optimal_lr.results["lr"]) == 12
    else:
        assert finder.optimal_batch_size == 4
