"""A plugin of pytest that switches HiFT in under Lightning's own tests, and writes a line of JSON about each of them.

``HIFT_VARIANT`` says how, ``HIFT_RESULTS`` where to write; ``HIFT_ONLY`` may name a file with the tests to run.
"""

import functools
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector

from lightning_hift import HiFTCallback, SweepSchedule
from lightning_hift.groups.grouping import LayerUnit
from lightning_hift.plugin import callback, offloading
from lightning_hift.plugin.step_values import StepValues

SECONDS = 300  # for a test; then it has failed
_seen = {"groups": 0}  # the most that took turns in a test; 0: HiFT did not train


@dataclass(frozen=True)
class EachParameter(SweepSchedule):
    """A group for each parameter, so that the one layer of most test models takes turns, too."""

    def split_unit(self, unit):
        return [LayerUnit(name, unit.modules, {name: p}) for name, p in unit.parameters.items()]


WHOLE = {"group_size": 10**6, "always_active": []}
OPTIONS = {
    "strategy": WHOLE,
    "callback": WHOLE,
    "default": {},
    "rotate": {"policy": EachParameter(), "always_active": []},
}


def add_callback(strategy, model):
    """To the Trainer that has just given its model to a strategy of Lightning."""
    trainer = model._trainer
    if type(strategy) is SingleDeviceStrategy and trainer is not None and callback.find_callback(trainer) is None:
        trainer.callbacks = _CallbackConnector._reorder_callbacks([offloading.HiFTCallback(), *trainer.callbacks])


def choose_strategy(options):
    """HiFT's, wherever a test leaves the choice to Lightning."""
    usual = {"strategy": ("auto",), "accelerator": ("auto", "cpu"), "devices": ("auto", 1, "1"), "num_nodes": (1,)}
    is_free = all(options.get(name, values[0]) in values for name, values in usual.items())
    return "hift" if is_free and "PL_TRAINER_" not in "".join(os.environ) else options.get("strategy", "auto")


def switch_in(variant):
    """Let every Trainer of this process train with HiFT."""
    attach, connect, init = callback.attach_engines, SingleDeviceStrategy.connect, pl.Trainer.__init__

    def attach_engines(*args, **options):
        engines = attach(*args, **options)
        _seen["groups"] = max(_seen["groups"], *(len(engine.groups) for engine in engines))
        return engines

    def connect_and_add(self, model):
        connect(self, model)
        add_callback(self, model)

    @functools.wraps(init)
    def init_with_strategy(self, *args, **options):
        init(self, *args, **{**options, "strategy": choose_strategy(options)})

    callback.attach_engines = attach_engines
    offloading.HiFTCallback = functools.partial(HiFTCallback, **OPTIONS[variant])
    StepValues.log = lambda self, trainer, engines: None  # many tests compare all that was logged
    if variant == "callback":
        SingleDeviceStrategy.connect = connect_and_add
    else:
        pl.Trainer.__init__ = init_with_strategy


def pytest_configure(config):
    config.addinivalue_line("markers", "flaky: of a plugin that is not needed here")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a test expects it so, and not as under nohup
    os.fsync = lambda file: None  # takes most of the time of tests with checkpoints
    if os.environ["HIFT_VARIANT"] != "plain":
        switch_in(os.environ["HIFT_VARIANT"])


def pytest_collection_modifyitems(items):
    if "HIFT_ONLY" in os.environ:
        wanted = set(Path(os.environ["HIFT_ONLY"]).read_text().splitlines())
        items[:] = [item for item in items if item.nodeid in wanted]


def give_up(signum, frame):
    raise TimeoutError(f"not over after {SECONDS} s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    _seen["groups"], item.hift = 0, {"test": item.nodeid, "outcome": "passed"}
    begin = time.monotonic()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        record = {**item.hift, **_seen, "seconds": round(time.monotonic() - begin, 2)}
        with open(os.environ["HIFT_RESULTS"], "a") as file:
            print(json.dumps(record), file=file)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.outcome != "passed" and item.hift["outcome"] == "passed":
        item.hift["outcome"] = report.outcome
        if report.failed:
            item.hift["error"] = f"{call.excinfo.typename}: {call.excinfo.value}"[:1500]
            item.hift["where"] = [f"{e.path}:{e.lineno + 1}" for e in call.excinfo.traceback][-6:]
    return report
