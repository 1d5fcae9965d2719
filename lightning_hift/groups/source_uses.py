"""What the entry points of a module's class use of ``self``, in the order of evaluation, from their source."""

from __future__ import annotations

import ast
import inspect
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

_ENTRY_POINTS = ("forward", "training_step")
_QUESTIONS = ("getattr", "hasattr", "isinstance", "len")
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_NOT_THE_USERS = ("torch.nn.modules.module", "lightning.")


class Use(NamedTuple):
    """Something of ``self`` in the source.

    Args:
        path: Its names: ``("parts", "layers")`` of ``self.parts["layers"]``, with ``*`` for what is not written out,
            as in ``getattr(self, f"layer{i}")``.
        passing: Only looks inside: ``self.decoder.embed.weight.dtype``.
        repeated: In a loop, which is listed as two passes of it, or in the arguments of ``zip``.
        carried: In a loop, in a statement whose result the next pass begins with: ``x = self.norm(x)``.
        called: It is called itself.
    """

    path: tuple[str, ...]
    passing: bool = False
    repeated: bool = False
    carried: bool = False
    called: bool = False


def read_uses(cls: type) -> tuple[tuple[Use, ...], str]:
    """Uses in the entry points of ``cls``, in order, and which of these cannot be read, and why; empty if all can."""
    reader = _Reader(cls)
    uses = tuple(use for entry in _ENTRY_POINTS for use in reader.uses_in_method(entry))
    return uses, "" if uses else reader.problem


class _Reader:
    """Reads methods of one class, each once, unfolding those that are called on ``self`` where they are called."""

    def __init__(self, cls: type) -> None:
        self.problem = ""
        self._cls = cls
        self._seen: set[tuple[str, int]] = set()
        self._called: set[ast.AST] = set()

    def uses_in_method(self, name: str, start: int = 0) -> Iterator[Use]:
        """Uses in a method or property, as the classes from ``start`` on in the order of resolution have it."""
        owners = self._cls.__mro__
        position = next((i for i, owner in enumerate(owners) if i >= start and name in owner.__dict__), None)
        if position is None or (name, position) in self._seen:
            return
        self._seen.add((name, position))
        if owners[position].__module__.startswith(_NOT_THE_USERS):
            return
        body = _body(owners[position].__dict__[name])
        if body is None:
            if name in _ENTRY_POINTS:
                self.problem = self.problem or f"{name} is not to be had"
            return
        yield from self._uses(body, position)

    def _uses(self, nodes: Iterable[ast.AST], position: int) -> Iterator[Use]:
        for node in nodes:
            children: Iterable[ast.AST] = ast.iter_child_nodes(node)
            passing = False
            if isinstance(node, ast.Call):
                self._called.add(node.func)
            if path := _path(node):
                passing = _looks_inside(node)
                yield Use(path, passing, called=node in self._called)
                children = ()
                yield from (use._replace(passing=use.passing or passing) for use in self.uses_in_method(path[0]))
            elif isinstance(node, ast.Attribute) and _is_super(node.value):
                yield from self.uses_in_method(node.attr, position + 1)
            elif isinstance(node, ast.Attribute):
                passing = _has_no_call(node)
            elif isinstance(node, (ast.For, ast.AsyncFor, ast.While, *_COMPREHENSIONS)):
                yield from self._uses_in_loop(node, position)
                children = ()
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "zip" in node.func.id:
                together = [use._replace(repeated=True) for use in self._uses(node.args, position)]
                yield from together * 2
                children = node.keywords
            elif isinstance(node, ast.Call) and not any(map(_is_earlier_call, ast.walk(node.func))):
                # The inner of two nested calls runs first, also where a module is handed over: run(self.b,
                # run(self.a, x)).
                children = (*sorted([*node.args, *node.keywords], key=_has_no_call), node.func)
                passing = isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS
            elif isinstance(node, ast.If) and _returns(node.body):  # a short cut for some cases
                yield from self._uses([node.test], position)
                yield from (use._replace(passing=True) for use in self._uses(node.body, position))
                children = node.orelse
            elif isinstance(node, (ast.With, ast.AsyncWith)):  # without gradients nothing trains
                names = [n for item in node.items for n in ast.walk(item) if isinstance(n, (ast.Name, ast.Attribute))]
                passing = "no_grad" in (n.id if isinstance(n, ast.Name) else n.attr for n in names)
            yield from (use._replace(passing=use.passing or passing) for use in self._uses(children, position))

    def _uses_in_loop(self, loop: ast.AST, position: int) -> Iterator[Use]:
        if isinstance(loop, _COMPREHENSIONS):
            results = [loop.key, loop.value] if isinstance(loop, ast.DictComp) else [loop.elt]
            once = [use._replace(repeated=True) for use in self._uses([*loop.generators, *results], position)]
        else:
            assert isinstance(loop, (ast.For, ast.AsyncFor, ast.While))
            carried = _carried(loop)
            head: list[ast.AST] = [loop.test] if isinstance(loop, ast.While) else [loop.iter]
            once = [
                use._replace(repeated=True, carried=use.carried or bool(_assigned(statement) & carried))
                for statement in [*head, *_flat(loop.body)]
                for use in self._uses([statement], position)
            ]
        yield from once * 2
        if not isinstance(loop, _COMPREHENSIONS):
            yield from self._uses(loop.orelse, position)


def _flat(body: list[ast.stmt]) -> list[ast.AST]:
    """What a loop does, with what is under ``if`` and ``with`` in it."""
    flat: list[ast.AST] = []
    for statement in body:
        if isinstance(statement, ast.If):
            flat += [statement.test, *_flat(statement.body), *_flat(statement.orelse)]
        elif isinstance(statement, (ast.With, ast.AsyncWith)):
            flat += [*(item.context_expr for item in statement.items), *_flat(statement.body)]
        else:
            flat.append(statement)
    return flat


def _assigned(node: ast.AST) -> set[str]:
    """Names to which an assignment, which ``node`` may be, gives values."""
    if not isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        return set()
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def _carried(loop: ast.For | ast.AsyncFor | ast.While) -> set[str]:
    """Names that a pass of the loop hands to something before it gives them values: those that the last pass left."""
    given: set[str] = set()
    carried: set[str] = set()
    for statement in _flat(loop.body):
        calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
        taken = [part for call in calls for argument in [*call.args, *call.keywords] for part in ast.walk(argument)]
        carried |= {node.id for node in taken if isinstance(node, ast.Name)} - given
        given |= _assigned(statement)
    return carried & given


def _body(function: Any) -> list[ast.AST] | None:
    """What a method or property does, as written; nothing for other attributes, ``None`` where there is no source."""
    for inner in ("fget", "__func__", "func"):  # of properties, class methods, partial functions
        function = getattr(function, inner, None) or function
    if isinstance(function, type) or not callable(function):
        return []
    try:
        source = inspect.getsource(inspect.unwrap(function))
        tree = ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, ValueError, SyntaxError, tokenize.TokenError):
        return None
    written = next((node for node in ast.walk(tree) if isinstance(node, _FUNCTIONS)), None)
    if written is None:
        return None
    rewritten = _InPlace(written).visit(written)
    return [rewritten.body] if isinstance(rewritten, ast.Lambda) else list(rewritten.body)


class _Member(ast.expr):
    """A path of ``self`` that the source has under another name."""

    def __init__(self, path: tuple[str, ...]) -> None:
        super().__init__()
        self.path = path


class _InPlace(ast.NodeTransformer):
    """Rewrites ``head = this.head; ...; head(x)`` to ``...; self.head(x)``: only the use counts, whatever its name."""

    def __init__(self, function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        arguments = [*function.args.posonlyargs, *function.args.args]
        self._first = arguments[0].arg if arguments else "self"
        stored = Counter(n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        self._paths: dict[str, tuple[str, ...]] = {}
        self._assignments: set[ast.AST] = set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name, path = node.targets[0].id, _path(node.value, self._first)
                if path and stored[name] == 1:
                    self._paths[name] = path
                    self._assignments.add(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        return ast.Pass() if node in self._assignments else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == self._first:
            return ast.Name("self", node.ctx)
        return _Member(self._paths[node.id]) if node.id in self._paths else node


def _path(node: ast.AST, root: str = "self") -> tuple[str, ...] | None:
    """Names of what ``node`` takes from ``self``; empty for itself, ``None`` if that is not all that it does."""
    if isinstance(node, _Member):
        return node.path
    if isinstance(node, ast.Name):
        return () if node.id == root else None
    name: str | None = None
    if isinstance(node, ast.Attribute):
        base, name = _path(node.value, root), node.attr
    elif isinstance(node, ast.Subscript):
        base, name = _path(node.value, root), _pattern(node.slice)
        base = () if base == ("_modules",) else base
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        base, name = (_path(node.args[0], root), _pattern(node.args[1])) if len(node.args) > 1 else (None, None)
        name = name if name and "*" in name else None  # a name in full only asks whether there is one
    else:
        return None
    return None if base is None or name is None or not name.strip("*") else (*base, name)


def _looks_inside(node: ast.AST) -> bool:
    """Whether a path ends in an attribute, or in what is in it."""
    inner = node.value if isinstance(node, ast.Subscript) else node
    is_deep = isinstance(inner, (ast.Attribute, _Member)) and len(_path(inner) or ()) > 1
    return is_deep or (isinstance(inner, ast.Subscript) and _looks_inside(inner))


def _pattern(node: ast.AST) -> str | None:
    """A name as far as it is written out, with ``*`` for the rest; ``None`` if nothing is."""
    if isinstance(node, ast.Constant) and type(node.value) in (str, int):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_pattern(part) or "*" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _pattern(node.left), _pattern(node.right)
        return f"{left or '*'}{right or '*'}" if left or right else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and (text := _pattern(node.left)):
        return re.sub(r"%\w+", "*", text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return re.sub(r"{[^}]*}", "*", _pattern(node.func.value) or "") or None
    return None


def _returns(body: list[ast.stmt]) -> bool:
    last = body[-1]
    return isinstance(last, ast.Return) or (isinstance(last, ast.With) and _returns(last.body))


def _has_no_call(node: ast.AST) -> bool:
    return not any(isinstance(part, ast.Call) for part in ast.walk(node))


def _is_earlier_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and not _is_super(node)


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
