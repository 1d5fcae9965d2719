"""In which order a module's forward pass uses its children, read from the source of ``forward``.

Registration order is a poor guide: OPT registers its final norm before its blocks, BART its embedding norm after them,
and a LightningModule may list its head first. The source of ``forward`` shows where each child is first used, for any
architecture and without running anything. Code without source (typed at a prompt, compiled) keeps registration order.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

from torch import nn

_ENTRY_POINTS = ("forward", "training_step")
_QUESTIONS = ("getattr", "hasattr", "isinstance", "len")


class _Use(NamedTuple):
    """An attribute of ``self`` in the source. A passing use only looks inside: ``self.decoder.embed.weight.dtype``."""

    name: str
    passing: bool


def members_in_forward_order(module: nn.Module) -> list[tuple[str, nn.Module | nn.Parameter]]:
    """Children and own parameters of ``module`` as (name, member) pairs, in the order in which its code uses them.

    A member that the code never names keeps its place in front of the next registered one that is named. Containers
    such as ``nn.ModuleList`` keep their registration order.
    """
    members: dict[str, nn.Module | nn.Parameter] = {
        **dict(module.named_parameters(recurse=False, remove_duplicate=False)),
        **{name: child for name, child in module._modules.items() if child is not None},
    }
    cls: type = type(module)
    uses = _uses(cls)
    rank: dict[str, int] = {}
    for passing in (False, True):
        for i, use in enumerate(uses):
            if use.passing == passing and use.name in members:
                rank.setdefault(use.name, i)

    place = len(uses)
    keyed: list[tuple[int, str]] = []
    for name in reversed(members):
        place = rank.get(name, place)
        keyed.append((place, name))
    keyed.reverse()
    return [(name, members[name]) for _, name in sorted(keyed, key=lambda pair: pair[0])]


@cache
def _uses(cls: type) -> tuple[_Use, ...]:
    """What the entry points of ``cls`` use, in order."""
    seen: set[tuple[str, int]] = set()
    return tuple(use for entry in _ENTRY_POINTS for use in _uses_in_method(cls, entry, 0, seen))


def _uses_in_method(cls: type, name: str, start: int, seen: set[tuple[str, int]]) -> Iterator[_Use]:
    """Uses in one method or property, with the methods that it calls on ``self`` unfolded where it calls them."""
    position = next((i for i, owner in enumerate(cls.__mro__) if i >= start and name in owner.__dict__), None)
    if position is None or (name, position) in seen:
        return
    seen.add((name, position))
    owner = cls.__mro__[position]
    if owner.__module__.startswith(("torch.nn.modules.module", "lightning.")):
        return
    for node, passing in _attributes(_body(owner.__dict__[name])):
        if _is_super(node.value):
            inner = _uses_in_method(cls, node.attr, position + 1, seen)
        else:
            yield _Use(node.attr, passing)
            inner = _uses_in_method(cls, node.attr, 0, seen)
        yield from (_Use(use.name, use.passing or passing) for use in inner)


def _body(function: Any) -> list[ast.AST]:
    """Statements of a function as written; nothing where there is no source."""
    function = getattr(function, "fget", None) or getattr(function, "__func__", function)
    if not callable(function):
        return []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return []
    written = tree.body[0]
    return list(_InPlace(written).visit(written).body) if isinstance(written, ast.FunctionDef) else [tree]


class _InPlace(ast.NodeTransformer):
    """Rewrites ``head = this.head; ...; head(x)`` to ``...; self.head(x)``: only the use counts, whatever its name."""

    def __init__(self, function: ast.FunctionDef) -> None:
        arguments = [*function.args.posonlyargs, *function.args.args]
        self._first = arguments[0].arg if arguments else "self"
        stored = Counter(n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        self._aliases = {
            statement.targets[0].id: statement.value
            for statement in ast.walk(function)
            if isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
            and stored[statement.targets[0].id] == 1
            and isinstance(statement.value, ast.Attribute)
            and isinstance(statement.value.value, ast.Name)
            and statement.value.value.id == self._first
        }

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return None if node.value in self._aliases.values() else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == self._first:
            return ast.Name("self", node.ctx)
        alias = self._aliases.get(node.id)
        return node if alias is None else ast.Attribute(ast.Name("self", ast.Load()), alias.attr, ast.Load())


def _attributes(nodes: Iterable[ast.AST]) -> Iterator[tuple[ast.Attribute, bool]]:
    """``self.name`` and ``super().name`` in the order of evaluation, and whether each is used in passing."""
    for node in nodes:
        children: Iterable[ast.AST] = ast.iter_child_nodes(node)
        passing = False
        if isinstance(node, ast.Attribute):
            if _is_self(node.value) or _is_super(node.value):
                yield node, False
            passing = _has_no_call(node)
        elif isinstance(node, ast.Call) and not any(map(_is_earlier_call, ast.walk(node.func))):
            # The inner of two nested calls runs first, also where a module is handed over: run(self.b, run(self.a, x)).
            children = (*sorted([*node.args, *node.keywords], key=_has_no_call), node.func)
            passing = isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp)):
            children = (*node.generators, node.elt)
        elif isinstance(node, ast.If) and _returns(node.body):  # a short cut for some cases
            yield from _attributes([node.test])
            yield from ((inner, True) for inner, _ in _attributes(node.body))
            children = node.orelse
        elif isinstance(node, ast.With):  # without gradients nothing trains
            passing = any("no_grad" in ast.unparse(item) for item in node.items)
        yield from ((inner, passing or inner_passing) for inner, inner_passing in _attributes(children))


def _returns(body: list[ast.stmt]) -> bool:
    last = body[-1]
    return isinstance(last, ast.Return) or (isinstance(last, ast.With) and _returns(last.body))


def _has_no_call(node: ast.AST) -> bool:
    return not any(isinstance(part, ast.Call) for part in ast.walk(node))


def _is_earlier_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and not _is_super(node)


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
