"""Runs whose length nobody knows: what is said of them names no number that is none."""

import logging
import re
import warnings
from datetime import timedelta

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_hift import HiFTCallback
from tests.models import Automatic, tokens, trainer

NO_NUMBER = re.compile(r"(?<![\w.])-?(inf|nan)\b|(?<!\w)-\d")


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.cat(tokens(6))


LENGTHS = {
    "epoch": {"max_epochs": 1},
    "accumulated": {"max_epochs": 1, "accumulate_grad_batches": 4},
    "time": {"max_epochs": -1, "max_time": timedelta(milliseconds=300)},
    "steps": {"max_epochs": -1, "max_steps": 4},
    "no_batches": {"max_epochs": 2, "limit_train_batches": 0},
}
SCHEDULES = {
    "none": {},
    "by_step": {"make_scheduler": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 3))},
    "by_epoch": {"make_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1), "interval": "epoch"},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "options",
    [{}, {"group_size": 1, "steps_per_group": 1}, {"hold_lr": "once"}, {"policy": "LISA"}],
    ids=["defaults", "given", "once", "lisa"],
)
def test_nothing_that_is_said_counts_what_is_not_known(options, length, schedule, caplog):
    caplog.set_level(logging.INFO, "lightning.pytorch")
    run = trainer(callbacks=[HiFTCallback(**options)], **LENGTHS[length])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Automatic(**SCHEDULES[schedule]), DataLoader(Stream(), batch_size=4))
    said = [words for record in caplog.records if "layer groups" in (words := record.getMessage())]
    said += [str(each.message) for each in caught if "lightning_hift" in each.filename or "HiFT" in str(each.message)]
    assert said or length == "no_batches"
    assert [words for words in said if NO_NUMBER.search(words.split("\n")[0])] == []


def test_a_schedule_by_the_sweep_in_a_run_of_unknown_length():
    run = trainer(callbacks=[HiFTCallback(group_size=1, steps_per_group=1, always_active=[], hold_lr="once")])
    with pytest.warns(UserWarning, match="LambdaLR will get one of 5 steps that it would get without HiFT"):
        run.fit(Automatic(**SCHEDULES["by_step"]), DataLoader(Stream(), batch_size=4))
