"""The order in which a forward pass uses the members of a module."""

from __future__ import annotations

import functools
import linecache
import types
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_hift.groups.forward_order import members_in_forward_order
from lightning_hift.groups.source_uses import read_uses


class Parts(nn.Module):
    """Registers a, b, c and d; subclasses use them in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(2, 2) for _ in range(4))


class Reversed(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.d(x)
        x = self.c(x)
        x = self.b(x)
        return self.a(x)


class Nested(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.c(self.d(x)) + 1))


class NestedInKeywords(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(input=self.b(input=self.c(input=self.d(input=x))))


class ChainedCalls(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.d(x).relu()).add(self.b(x)).add(self.a(x))


class InMethods(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def decode(self, x: Tensor) -> Tensor:
        return self.a(self.b(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.c(self.d(x))


class RecursiveMethods(Parts):
    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = self.c(self.d(x))
        return self.forward(x, depth - 1) if depth else self.a(self.b(x))


class InComprehension(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return sum([self.b(y) for y in self.c(self.d(x))], self.a(x))


class InClosure(Parts):
    def forward(self, x: Tensor) -> Tensor:
        def first(x: Tensor) -> Tensor:
            return self.c(self.d(x))

        return (lambda x: self.a(self.b(x)))(first(x))


class InProperty(Parts):
    @property
    def first(self) -> nn.Module:
        return self.d

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.c(self.first(x))))


class AsArgument(Parts):
    def run(self, module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return module(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.c, self.run(self.d, x))
        return self.run(self.a, self.run(self.b, x))


class Inherited(Reversed):
    pass


class ThroughSuper(Reversed):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(self.before(x)))


class Overridden(Reversed):
    """The parent's forward never runs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.a(self.c(self.b(x))))


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Decorated(Parts):
    @logged
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.c(self.d(x))))


class AskedAhead(Parts):
    """Looking inside a child, or asking whether it is there, does not use it."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.a, nn.Linear) or len(self.b.weight) == 0:
            raise TypeError
        x = x.to(self.a.weight.dtype)
        with torch.no_grad():
            self.c(x)
        return self.a(self.b(self.c(self.d(x).relu()).relu()))


class OnlyLookedInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.body = nn.ModuleDict({"one": nn.Linear(2, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body.one(x))


class UnusedInside(Parts):
    """b and c are never named: they keep their place in front of d."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.d(x))


class ByComputedName(Parts):
    def forward(self, x: Tensor) -> Tensor:
        for name in "abcd":
            x = getattr(self, name)(x)
        return x


class DirectParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.linear = nn.Linear(2, 2)
        self.token = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.token) * self.scale


class OnlyTrainingStep(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(2, 2), nn.Linear(2, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.body(batch)).sum()


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in members_in_forward_order(module)]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Reversed, "d c b a"),
        (Nested, "d c b a"),
        (NestedInKeywords, "d c b a"),
        (ChainedCalls, "d c b a"),
        (InMethods, "d c b a"),
        (RecursiveMethods, "d c b a"),
        (InComprehension, "d c b a"),
        (InClosure, "d c b a"),
        (InProperty, "d c b a"),
        (AsArgument, "d c b a"),
        (Inherited, "d c b a"),
        (ThroughSuper, "before d c b a after"),
        (Overridden, "b c a d"),
        (Decorated, "d c b a"),
        (AskedAhead, "d c b a"),
        (OnlyLookedInside, "body head"),
        (UnusedInside, "b c d a"),
        (ByComputedName, "a b c d"),
        (DirectParameters, "token linear scale"),
        (OnlyTrainingStep, "body head"),
    ],
)
def test_order(module: type[nn.Module], expected: str) -> None:
    assert names(module()) == expected.split()


def test_members_are_the_modules_own() -> None:
    module = DirectParameters()
    assert dict(members_in_forward_order(module)) == {
        "token": module.token,
        "linear": module.linear,
        "scale": module.scale,
    }


def test_module_without_members() -> None:
    assert members_in_forward_order(nn.Identity()) == []


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_container_keeps_its_order(container: Callable[..., nn.Module]) -> None:
    layers = [nn.Linear(1, size) for size in (3, 1, 2)]
    module = container(layers) if container is nn.ModuleList else container(*layers)
    assert [member for _, member in members_in_forward_order(module)] == layers


def test_module_used_under_two_names_is_listed_twice() -> None:
    module = Reversed()
    module.b = module.d
    assert names(module) == ["d", "c", "b", "a"]


def test_child_set_to_none_is_left_out() -> None:
    module = Reversed()
    module.c = None
    assert names(module) == ["d", "b", "a"]


@pytest.mark.filterwarnings("ignore:The source of FromAnObject.forward is not to be had")
def test_forward_that_is_no_plain_function() -> None:
    class Object:
        def __call__(self, x: Tensor) -> Tensor:
            return x

    module = types.new_class("FromAnObject", (Parts,), exec_body=lambda space: space.update(forward=Object()))()
    assert names(module) == ["a", "b", "c", "d"]


def test_reading_the_source_runs_nothing() -> None:
    class Explodes(Reversed):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("must not run")
            return self.d(x)

        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("must not run")

    assert names(Explodes())[-1] == "d"


class OtherName(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body, self.embedding = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(this, x):
        return this.head(this.body(this.embedding(x)))


class Aliases(OtherName):
    def forward(self, x):
        head = self.head
        body = self.body
        x = self.embedding(x)
        for _ in range(2):
            x = body(x)
        return head(x)


@pytest.mark.parametrize("cls", [OtherName, Aliases])
def test_other_names_for_self_and_for_members(cls):
    assert [name for name, _ in members_in_forward_order(cls())] == ["embedding", "body", "head"]


class OnlyAnAlias(Parts):
    """Blocks of which nothing is left when names are put in place of their members."""

    def forward(self, x):
        if x.sum() > 0:
            first = self.d
        for _ in range(2):
            second = self.c
        while x.sum() > 9:
            third = self.b
        with torch.enable_grad():
            fourth = self.a
        try:
            fifth = self.a
        finally:
            sixth = self.a
        return fourth(third(second(first(x)))) + fifth(x) + sixth(x)


class Matched(Parts):
    def forward(self, x):
        match x.ndim:
            case 1:
                return self.c(self.d(x))
            case _:
                x = self.c(self.d(x))
        return self.a(self.b(x))


class Walrus(Parts):
    def forward(self, x):
        if (y := self.c(self.d(x))) is not None:
            print(z := self.b(y))
        return self.a(z)


class Attempted(Parts):
    def forward(self, x):
        try:
            x = self.d(x)
        except ValueError:
            x = self.c(x)
        else:
            x = self.b(x)
        finally:
            x = self.a(x)
        return x


class Starred(Parts):
    def forward(self, *xs, **kwargs):
        first, *rest = [self.c(self.d(x)) for x in xs]
        return self.a(self.b(torch.cat([first, *rest], dim=0)))


class Asynchronous(Parts):
    async def forward(self, x):
        async with self.lock, self.other as y:
            async for z in self.stream(y):
                x = self.c(await self.d(z))
        return self.a(self.b(x))


class Lambda(Parts):
    forward = lambda module, x: module.a(module.b(module.c(module.d(x))))  # noqa: E731


class Partial(Parts):
    def run(self, x, times):
        return self.a(self.b(self.c(self.d(x * times))))

    forward = functools.partialmethod(run, times=2)


class NoSelf(Parts):
    @staticmethod
    def forward(*args):
        return args[0]


class TextAtTheMargin(Parts):
    def forward(self, x):
        _ = """
at the margin
"""
        return self.a(self.b(self.c(self.d(x))))


class Yielding(Parts):
    def forward(self, x):
        yield self.d(x)
        yield from (self.c(x), self.b(x))
        return self.a(x)


READABLE = [OnlyAnAlias, Matched, Walrus, Attempted, Starred, Asynchronous, Lambda, Partial, TextAtTheMargin, Yielding]


@pytest.mark.parametrize("cls", READABLE)
@pytest.mark.filterwarnings("error")
def test_forms_of_code(cls):
    assert names(cls()) == ["d", "c", "b", "a"]


@pytest.mark.filterwarnings("error")
def test_forward_that_uses_nothing_is_in_order():
    assert names(NoSelf()) == ["a", "b", "c", "d"]


def of_builtin():
    return types.new_class("OfBuiltin", (Parts,), exec_body=lambda space: space.update(forward=torch.relu))()


def of_c_method():
    return types.new_class("OfC", (Parts,), exec_body=lambda space: space.update(forward=torch.Tensor.add))()


def of_code():
    space = {"Parts": Parts, "__name__": __name__}
    exec("class OfCode(Parts):\n    def forward(self, x):\n        return self.a(self.d(x))", space)
    return space["OfCode"]()


def of_a_circle():
    def forward(self, x):
        return self.d(x)

    forward.__wrapped__ = forward
    return types.new_class("OfACircle", (Parts,), exec_body=lambda space: space.update(forward=forward))()


@pytest.mark.parametrize("make", [of_builtin, of_c_method, of_code, of_a_circle])
def test_code_that_cannot_be_read_is_said_to_be_in_the_order_of_registration(make):
    with pytest.warns(UserWarning, match=r"\.forward is not to be had.*registered \(a, b, c, d.*units="):
        assert names(make()) == ["a", "b", "c", "d"]


def test_whatever_fails_while_reading_is_said(monkeypatch):
    class Fails(Parts):
        def forward(self, x):
            return self.a(x)

    def fail(cls):
        raise RecursionError("too deep")

    monkeypatch.setattr("lightning_hift.groups.forward_order.read_uses", fail)
    with pytest.warns(UserWarning, match=r"Fails\.forward cannot be understood \(RecursionError: too deep\)"):
        assert names(Fails()) == ["a", "b", "c", "d"]


STATEMENTS = [
    "first = self.d",
    "x = first(x)",
    "x = self.c(x)",
    "x = [self.b(y) for y in x if self.a]",
    "x, *_ = self.b(x), self.a",
    "x += self.a(x) if (z := self.b) else z(x)",
    "x = getattr(self, f'{x}')(getattr(self, 'a%d' % x)(x))",
    "del first",
    "pass",
    "return self.a(x)",
    "x = {self.a: self.b(x), **self.c}",
    "x = lambda self=self: self.a(self.b)",
    "x = f'{self.a!r:>{self.b}}'",
    "global first",
    "x = self['a'][0](x); self.layers[-1][...](x)",
    "def first(x, /, *, y=self.a): return self.b(x)",
    "class First(self.a): forward = self.b",
    "x = super().forward(self.c(x))",
]
HEADS = ["if x:", "for x in self.c:", "while self.b(x):", "with self.a as x, torch.no_grad():", "try:", "match x:"]


@st.composite
def code(draw, depth=0):
    """Lines of a function's body."""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        if depth < 3 and draw(st.booleans()):
            head = draw(st.sampled_from(HEADS))
            inner = ["    " + line for line in draw(code(depth + 1))]
            if head == "match x:":
                inner = ["    case [self.a, *_]:", *("    " + line for line in inner)]
            lines += [head, *inner]
            if head == "try:":
                lines += ["finally:", *("    " + line for line in draw(code(depth + 1)))]
            elif head == "if x:" and draw(st.booleans()):
                lines += ["else:", *("    " + line for line in draw(code(depth + 1)))]
        else:
            lines.append(draw(st.sampled_from(STATEMENTS)))
    return lines


@settings(max_examples=150, deadline=None)
@given(lines=code())
@pytest.mark.filterwarnings("error")
def test_any_code_is_read(lines):
    text = "\n    ".join(["def forward(self, x):", *lines])
    linecache.cache["<any code>"] = (len(text), None, text.splitlines(keepends=True), "<any code>")
    space = {"torch": torch}
    try:
        exec(compile(text, "<any code>", "exec"), space)
    except SyntaxError:  # a name declared global after its use
        assume(False)
    cls = types.new_class("AnyCode", (Parts,), exec_body=lambda body: body.update(forward=space["forward"]))
    assert read_uses(cls)[1] == ""
    assert sorted(names(cls())) == ["a", "b", "c", "d"]
