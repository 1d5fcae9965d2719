"""Optimizers of the same class as another one, to try things out on."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def bare_twin(optimizer: Optimizer) -> Optimizer:
    """A twin with copies of the ``param_groups``, the same parameters, and neither state nor hooks."""
    kind = type(optimizer)
    twin = object.__new__(kind)  # not copy.copy, which keeps what __getstate__ returns, and no more
    hooks = {key: OrderedDict[Any, Any]() for key in vars(optimizer) if key.startswith("_optimizer_")}
    groups = [_copied(group) | {"params": list(group["params"])} for group in optimizer.param_groups]
    # What was put on the instance in the place of a method of the class stays behind; tables may be written to.
    own = {
        key: copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for key, value in vars(optimizer).items()
        if not hasattr(kind, key)
    }
    twin.__dict__.update({**own, **hooks, "state": defaultdict(dict), "param_groups": groups})
    return twin


def twin_of(optimizer: Optimizer, options: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> Optimizer:
    """A twin with the ``options``, on the CPU, of one of the ``param_groups``, over other parameters."""
    kind = type(optimizer)
    known: dict[str, Any] = {key: False if key == "capturable" else value for key, value in _copied(options).items()}
    accepted = inspect.signature(kind.__init__).parameters
    try:
        twin = kind(list(parameters), **{key: value for key, value in known.items() if key in accepted})
    except Exception:  # its constructor takes other arguments than it keeps
        twin = bare_twin(optimizer)
    twin.param_groups = [{**known, "params": list(parameters)}]
    return twin


def _copied(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in options.items()
        if key != "params"
    }
