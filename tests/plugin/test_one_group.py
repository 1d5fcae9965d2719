"""One layer group is full fine-tuning: with the defaults, all that a run does is what plain Lightning does."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import lr_scheduler as schedulers

from lightning_hift import HiFTCallback
from tests.matrices import crossed
from tests.models import Automatic, loader, trainer

EPOCHS, BATCHES = 3, 5


class Draws(schedulers.LRScheduler):
    """Holds generators of two kinds, and a list."""

    def __init__(self, optimizer):
        self.draws, self.seen, self.rest = random.Random(1), [], (1 / n for n in itertools.count(1))
        super().__init__(optimizer)

    def get_lr(self):
        self.seen.append(self.last_epoch)
        return [base * (self.draws.random() + next(self.rest)) for base in self.base_lrs]

    def state_dict(self):
        return {"last_epoch": self.last_epoch, "seen": list(self.seen)}


def counted(optimizer):
    calls = []
    return schedulers.LambdaLR(optimizer, lambda step: 0.9 ** (calls.append(step) or len(calls)))


def drawn(optimizer):
    return schedulers.LambdaLR(optimizer, lambda step: float(torch.rand(())))


def plateau(optimizer):
    return schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)


SCHEDULES = {
    "none": None,
    "warmup": lambda o: schedulers.LambdaLR(o, lambda step: min(1.0, step / 8)),
    "nothing": lambda o: schedulers.LambdaLR(o, lambda step: 0.0),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, 0.05, total_steps=EPOCHS * BATCHES + 1),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, total_iters=7), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "cyclic": lambda o: schedulers.CyclicLR(o, 1e-3, 0.01, 4, cycle_momentum=False),
    "plateau": plateau,
    "draws": Draws,
    "counted": counted,
    "drawn": drawn,
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "tensor_lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005),
}
CASES: dict[str, dict[str, Any]] = {
    **{f"step-{name}": {"make_scheduler": make} for name, make in SCHEDULES.items() if name != "plateau"},
    **{
        f"epoch-{name}": {"make_scheduler": make, "interval": "epoch"}
        for name, make in SCHEDULES.items()
        if name in ("exponential", "plateau", "draws")
    },
    **{
        f"optimizer-{name}": {"make_scheduler": SCHEDULES["exponential"], "make_optimizer": make}
        for name, make in OPTIMIZERS.items()
    },
    "accumulation": {"make_scheduler": SCHEDULES["exponential"], "accumulate_grad_batches": 2},
    "clipping": {"make_scheduler": SCHEDULES["one_cycle"], "gradient_clip_val": 0.05},
    "bf16-mixed": {"make_scheduler": SCHEDULES["sequential"], "precision": "bf16-mixed"},
    "dropout": {"make_scheduler": SCHEDULES["drawn"], "dropout": 0.3},
}
WAYS = {
    "callback": lambda **options: {"callbacks": [HiFTCallback(**options)]},
    "strategy": lambda **options: {"strategy": "hift", "callbacks": [HiFTCallback(**options)]},
}


class Memory(Logger):
    """Keeps what is logged."""

    name, version = "memory", 0

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        if not any(key.startswith("hift/") for key in metrics):  # those have rows of their own
            self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Recorder(pl.Callback):
    """Everything that another callback can see after each batch, and every third checkpoint."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
        (optimizer,) = run.optimizers
        options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        metrics = {key: value for key, value in run.callback_metrics.items() if not key.startswith("hift/")}
        gradients = [p.requires_grad for p in module.parameters()]
        self.seen.append(copy.deepcopy([outputs, options, metrics, gradients, run.global_step]))
        if batch_idx % 3 == 2:
            checkpoint = run._checkpoint_connector.dump_checkpoint(weights_only=False)
            for state in checkpoint["optimizer_states"]:
                state.pop("hift", None)
            self.seen.append(copy.deepcopy({k: v for k, v in checkpoint.items() if k != "callbacks"}))


def run_of(way, make_scheduler=None, make_optimizer=OPTIMIZERS["adamw"], interval="step", dropout=0.0, **options):
    module = Automatic(make_optimizer, make_scheduler, interval)
    for block in module.net.blocks:
        block.register_forward_hook(lambda block, _, out: nn.functional.dropout(out, dropout, block.training))
    recorder, logger = Recorder(), Memory()
    callbacks = [*way.pop("callbacks", []), LearningRateMonitor(log_momentum=make_scheduler is not None), recorder]
    run = trainer(**way, **options, callbacks=callbacks, logger=logger, log_every_n_steps=1, max_epochs=EPOCHS)
    torch.manual_seed(5)
    run.fit(module, loader(BATCHES), loader(2))
    rest = [config.scheduler.state_dict() for config in run.lr_scheduler_configs], torch.rand(3)
    return [recorder.seen, logger.rows, module.lrs, module.state_dict(), run.optimizers[0].state_dict()["state"], rest]


def assert_same(a, b, where=""):
    """Bit for bit, whatever it is."""
    if isinstance(a, Mapping):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{index}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize(("case", "way"), crossed(CASES, WAYS))
def test_all_is_that_of_plain_lightning(case, way):
    assert_same(run_of(WAYS[way](group_size=99), **CASES[case]), run_of({}, **CASES[case]))


@pytest.mark.filterwarnings("error:.* comes by each layer group")
@pytest.mark.parametrize("hold_lr", ["replay", "once", "off"])
@pytest.mark.parametrize("name", ["warmup", "draws"])
def test_steps_per_group_and_ways_to_hold_do_not_matter(name, hold_lr):
    options = {"make_scheduler": SCHEDULES[name]}
    way = WAYS["callback"](group_size=99, steps_per_group=4, hold_lr=hold_lr)
    assert_same(run_of(way, **options), run_of({}, **options))


def test_a_model_of_a_single_unit_with_the_defaults():
    class Line(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 2)
            self.lrs = []

        def training_step(self, batch, batch_idx):
            self.lrs.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": SCHEDULES["warmup"](optimizer), "interval": "step"},
            }

    def fit(**way):
        module = Line()
        data = torch.utils.data.DataLoader(torch.arange(40.0).reshape(10, 4))
        run = trainer(max_epochs=-1, max_steps=200, **way)
        run.fit(module, data)
        return [module.lrs, module.state_dict(), run.optimizers[0].state_dict()["state"]]

    plain = fit()
    assert_same(fit(callbacks=[HiFTCallback()]), plain)
    assert_same(fit(strategy="hift", callbacks=[HiFTCallback(steps_per_group=7)]), plain)
