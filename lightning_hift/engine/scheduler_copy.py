"""Copies of schedulers that can be stepped on trial: nothing that belongs to the user is touched."""

from __future__ import annotations

import copy
import dis
import inspect
import sys
import sysconfig
import warnings
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from enum import Enum
from functools import partial
from logging import Logger
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hift.engine.random_state import RandomState

_FIXED = (int, float, complex, str, bytes, type(None), type, ModuleType, BuiltinFunctionType, range, Enum, Logger)
_CONTAINERS = (list, tuple, Mapping, Set, deque)
_MOST = 10_000  # objects of a scheduler, to be copied for each sweep
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
_OUTSIDE = ("STORE_GLOBAL", "DELETE_GLOBAL")
_TO_OBJECTS = ("STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
_WRITERS = {
    "append",
    "appendleft",
    "extend",
    "extendleft",
    "insert",
    "remove",
    "pop",
    "popleft",
    "popitem",
    "clear",
} | {*("update", "setdefault", "add", "discard", "sort", "reverse", "rotate", "next", "send", "setattr", "__setattr__")}


def copy_scheduler(scheduler: Any, optimizer: Optimizer, stand_in: Optimizer) -> Any:
    """A copy that steps ``stand_in`` in the place of ``optimizer``, with all that ``scheduler`` holds but functions.

    Raises:
        Exception: Of any kind; something in it cannot be copied.
    """
    groups = zip(optimizer.param_groups, stand_in.param_groups, strict=True)
    places = (
        (getattr(scheduler, "optimizer", optimizer), stand_in),  # perhaps one that wraps it, as Fabric's do
        (optimizer, stand_in),
        (optimizer.param_groups, stand_in.param_groups),
        *groups,
    )
    return copy.deepcopy(scheduler, {id(original): other for original, other in places})


def why_not_copied(scheduler: Any, optimizer: Optimizer) -> str | None:
    """What rules out that a copy of ``scheduler`` is stepped, in words: it could change what is no part of it.

    A copy shares the code of the user's classes and functions. What that reaches beyond the scheduler may be read only,
    which is taken from the code itself.
    """
    owner = getattr(scheduler, "optimizer", optimizer)  # perhaps one that wraps it
    seen = {id(owner), id(optimizer), id(optimizer.param_groups), *map(id, optimizer.param_groups)}
    ahead = [scheduler]
    while ahead:
        value = ahead.pop()
        if id(value) in seen or (isinstance(value, (*_FIXED, Tensor)) and not isinstance(value, nn.Parameter)):
            continue
        seen.add(id(value))
        if len(seen) > _MOST:
            return "holds too much to be copied for each sweep"
        if isinstance(value, (nn.Module, nn.Parameter, Optimizer)) or inspect.isgenerator(value):
            return f"holds a {type(value).__name__}"
        if isinstance(value, FunctionType) or (isinstance(value, MethodType) and not _is_inner(value)):
            if not _only_reads(value):
                return f"calls {value.__qualname__}, which may keep something elsewhere"
            continue
        outside = [name for name, inner in _code_of(type(value)) if not _reaches_nothing(inner)]
        if outside:
            return f"is of {type(value).__name__}, which may keep something elsewhere ({outside[0]})"
        ahead += _held_by(value)
    return None


def stand_in_for(optimizer: Optimizer) -> Optimizer:
    """An optimizer that has nothing but the options of ``optimizer``."""
    stand_in = torch.optim.SGD([torch.zeros(())], lr=0.0)
    stand_in.param_groups = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"} | {"params": []}
        for group in optimizer.param_groups
    ]
    stand_in.defaults = optimizer.defaults
    return stand_in


@contextmanager
def on_trial() -> Iterator[None]:
    """In this context copies are stepped: random numbers go on as before, and torch does not warn.

    It does where a scheduler is stepped and its optimizer was not; a copy's never is.
    """
    random_state = RandomState.capture()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        warnings.filterwarnings("ignore", message="Seems like `optimizer.step")
        try:
            yield
        finally:
            random_state.restore()


def _held_by(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, _CONTAINERS):
        yield from value
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield value.__self__
    yield from getattr(value, "__dict__", {}).values()


def _is_inner(method: MethodType) -> bool:
    """Whether it belongs to an object that is copied together with a scheduler."""
    return not isinstance(method.__self__, (nn.Module, *_FIXED))


def _code_of(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class of the user's, and those it derives from, hold beside what Python puts there."""
    for name, value in ((n, v) for each in kind.__mro__ if not _is_installed(each) for n, v in vars(each).items()):
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(value, FunctionType) or not (name.startswith("__") or name == "_abc_impl"):
            yield name, value


def _reaches_nothing(value: Any) -> bool:
    """Whether a member of a class gives its objects nothing to write to but themselves."""
    if isinstance(value, FunctionType):
        return not _writes(value, _OUTSIDE) and all(
            _only_reads(inner) if isinstance(inner, FunctionType) else _reaches_nothing(inner)
            for inner in _reached_by(value)
        )
    return isinstance(value, _FIXED) or (isinstance(value, (tuple, frozenset)) and all(map(_reaches_nothing, value)))


def _only_reads(function: FunctionType | MethodType) -> bool:
    """Whether nothing that ``function`` reaches can have changed when it returns, as far as its code tells."""
    ahead: list[Any] = [function]
    seen: set[int] = set()
    names: set[str] = set()
    objects: list[Any] = []  # whose attributes count if they are named
    writes = reaches = False
    while ahead:
        value = ahead.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, MethodType):
            ahead += (value.__func__, value.__self__)
        elif isinstance(value, FunctionType) and not _is_installed(value):
            if _writes(value, _OUTSIDE):
                return False
            names |= (new := _names(value.__code__))
            writes |= _writes(value, _TO_OBJECTS) or bool(new & _WRITERS)
            reaches |= bool(vars(value))
            ahead += _reached_by(value)
        elif isinstance(value, _CONTAINERS):
            reaches |= not isinstance(value, (tuple, frozenset))
            ahead += _held_by(value)
        elif isinstance(value, (type, ModuleType)):
            reaches |= not _is_installed(value)
        elif isinstance(value, (Namespace, SimpleNamespace, nn.Module)) or not _is_installed(type(value)):
            reaches = True
            objects.append(value)
        elif not isinstance(value, (*_FIXED, FunctionType, Tensor)):
            return False  # an iterator, a generator of random numbers, or the like
        for each in objects:
            ahead += (held for name, held in getattr(each, "__dict__", {}).items() if name in names)
            ahead += (code for name, code in _code_of(type(each)) if name in names | {"__call__"})
    return not (writes and reaches)


def _reached_by(function: FunctionType) -> Iterator[Any]:
    """What a function sees beside its arguments: what it closes over, names, and has as defaults."""
    if _is_installed(function):
        return
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing yet
            continue
    yield from (function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__)
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values())


def _names(code: CodeType) -> set[str]:
    inner = (_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*inner)


def _writes(function: FunctionType, operations: Iterable[str]) -> bool:
    """Whether the code has any of these operations, or writes to what it closes over."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += (const for const in code.co_consts if isinstance(const, CodeType))
        for each in dis.get_instructions(code):
            is_free = each.opname in ("STORE_DEREF", "DELETE_DEREF") and each.argval in function.__code__.co_freevars
            if each.opname in operations or is_free:
                return True
    return False


def _is_installed(value: Any) -> bool:
    """Whether a class, function or module comes with Python or with a package; these are taken to keep nothing."""
    if isinstance(value, FunctionType):
        return value.__code__.co_filename.startswith(_INSTALLED)
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return name.partition(".")[0] in sys.stdlib_module_names or file.startswith(_INSTALLED)
