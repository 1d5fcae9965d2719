"""Lists that one loop goes through together are one stack, and what reaches down is not active at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import zip_longest

import pytest
import torch
from torch import Tensor, nn

from lightning_hift.engine.optimizer_groups import find_groups
from lightning_hift.engine.options import HiFTOptions
from lightning_hift.groups.alternation import steps_in_forward_order
from lightning_hift.groups.grouping import find_layer_units
from tests.architectures import Block

WIDTH, DEPTH = 8, 4


class Lists(nn.Module):
    """Loose norms beside a list of blocks; subclasses say how the loop goes through them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(400, WIDTH)
        self.add_lists()
        self.head = nn.Linear(WIDTH, 3)

    def add_lists(self) -> None:
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)).mean(1))


class Zip(Lists):
    def body(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x))
        return x


class EnumeratedZip(Lists):
    def body(self, x: Tensor) -> Tensor:
        for _, (layer, norm) in enumerate(zip_longest(self.layers, self.norms)):
            x = norm(layer(x))
        return x


class ZipAhead(Lists):
    def body(self, x: Tensor) -> Tensor:
        pairs = list(zip(self.layers, self.norms, strict=True))
        for layer, norm in pairs:
            x = norm(layer(x))
        return x


class Enumerate(Lists):
    def body(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = self.norms[i](layer(x))
        return x


class Indexed(Lists):
    def body(self, x: Tensor) -> Tensor:
        for i in range(len(self.layers)):
            x = self.norms[i](self.layers[i](x))
        return x


class While(Lists):
    def body(self, x: Tensor) -> Tensor:
        i = 0
        while i < DEPTH:
            x = self.layers[i](x)
            x = self.norms[i](x)
            i += 1
        return x


class InAMethod(Lists):
    def body(self, x: Tensor) -> Tensor:
        for i in range(DEPTH):
            x = self.one(i, x)
        return x

    def one(self, i: int, x: Tensor) -> Tensor:
        return self.norms[i](self.layers[i](x))


class Aliased(Lists):
    def body(this, x: Tensor) -> Tensor:
        layers, norms = this.layers, this.norms
        blocks = this.layers
        scales = this.norms
        assert len(layers) == len(norms)
        for block, scale in zip(blocks, scales, strict=True):
            x = scale(block(x))
        return x


class WrittenOut(Lists):
    def body(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.layers[0](x))
        x = self.norms[1](self.layers[1](x))
        x = self.norms[2](self.layers[2](x))
        return self.norms[3](self.layers[3](x))


class InADict(Lists):
    def add_lists(self) -> None:
        super().add_lists()
        self.parts = nn.ModuleDict({"norms": self.norms, "layers": self.layers})
        del self.layers, self.norms

    def body(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.parts["layers"], self.parts.norms, strict=True):
            x = norm(layer(x))
        return x


class Dicts(Lists):
    def add_lists(self) -> None:
        self.layers = nn.ModuleDict({str(i): Block() for i in range(DEPTH)})
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(WIDTH) for i in range(DEPTH)})

    def body(self, x: Tensor) -> Tensor:
        for name in self.layers:
            x = self.norms[name](self.layers[name](x))
        return x


class NumberedAttributes(Lists):
    def add_lists(self) -> None:
        for i in range(DEPTH):
            self.add_module(f"layers{i}", Block())
        for i in range(DEPTH):
            self.add_module(f"norms{i}", nn.LayerNorm(WIDTH))

    def body(self, x: Tensor) -> Tensor:
        for i in range(DEPTH):
            x = getattr(self, f"norms{i}")(getattr(self, "layers" + str(i))(x))
        return x


class OneNormFewer(Lists):
    def add_lists(self) -> None:
        super().add_lists()
        self.norms = self.norms[1:]

    def body(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.norms):
                x = self.norms[i](x)
        return x


class Scales(Lists):
    def add_lists(self) -> None:
        super().add_lists()
        del self.norms
        self.norms = nn.ParameterList(torch.ones(WIDTH) for _ in range(DEPTH))

    def body(self, x: Tensor) -> Tensor:
        for scale, layer in zip(self.norms, self.layers, strict=True):
            x = layer(scale * x)
        return x


ALTERNATING = [Zip, EnumeratedZip, ZipAhead, Enumerate, Indexed, While, InAMethod, Aliased, WrittenOut, InADict, Dicts]
ALTERNATING += [NumberedAttributes, OneNormFewer, Scales]


def always_active(model: nn.Module) -> list[str]:
    """Units that train at every step by default."""
    (found,) = find_groups(model, [torch.optim.AdamW(model.parameters())], HiFTOptions())
    return [unit.name for unit in found.always_active]


def blocks_passed(model: nn.Module, parameters: Iterable[nn.Parameter]) -> int:
    """Through or to the end of how many blocks the backward pass of these parameters alone goes, as autograd has it."""
    model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    outputs: list[Tensor] = []
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    handles = [block.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for block in blocks]
    model(torch.arange(6).reshape(2, 3))
    for handle in handles:
        handle.remove()
    model.requires_grad_(True)
    return sum(output.requires_grad for output in outputs)


@pytest.mark.parametrize("kind", ALTERNATING)
def test_members_of_lists_that_alternate_are_one_unit(kind: type[Lists]) -> None:
    model = kind()
    units = find_layer_units(model)
    assert [unit.place for unit in units] == list(range(DEPTH + 2))
    assert (units[0].name, units[-1].name) == ("embedding", "head")
    for i, unit in enumerate(units[1:-1]):
        owners = {name.split(f"{i}")[0].rstrip(".").rpartition(".")[2] for name in unit.parameters}
        assert owners == ({"layers"} if kind is OneNormFewer and i == DEPTH - 1 else {"layers", "norms"})


@pytest.mark.parametrize("kind", ALTERNATING)
def test_what_is_always_active_ends_every_backward_pass_at_the_top(kind: type[Lists]) -> None:
    model = kind()
    assert always_active(model) == ["head"]
    *_, below, head = find_layer_units(model)
    assert blocks_passed(model, head.parameters.values()) == 0
    assert blocks_passed(model, [*below.parameters.values(), *head.parameters.values()]) <= 1


class SharedNorm(Lists):
    def add_lists(self) -> None:
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.norm(layer(x))
        return x


class SharedNormNowAndThen(SharedNorm):
    def body(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i % 2:
                x = self.norm(x)
        return x


class EverySecond(Lists):
    def add_lists(self) -> None:
        super().add_lists()
        self.norms = self.norms[:2]

    def body(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i % 2 == 0:
                x = self.norms[i // 2](x)
        return x


def in_turns(layers: nn.ModuleList, norms: nn.ModuleList, x: Tensor) -> Tensor:
    for layer, norm in zip(layers, norms, strict=True):
        x = norm(layer(x))
    return x


class OutOfSight(Lists):
    def body(self, x: Tensor) -> Tensor:
        return in_turns(self.layers, self.norms, x)


@pytest.mark.parametrize("kind", [SharedNorm, SharedNormNowAndThen, EverySecond, OutOfSight])
def test_what_a_loop_uses_at_each_depth_is_not_always_active(kind: type[Lists]) -> None:
    model = kind()
    by_name = {unit.name: unit for unit in find_layer_units(model)}
    for name in always_active(model):
        assert blocks_passed(model, by_name[name].parameters.values()) == 0


class FinalNorm(Lists):
    """One after the loop, one that only collects what comes out of the layers, and heads for each of these."""

    def add_lists(self) -> None:
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def body(self, x: Tensor) -> Tensor:
        collected = ()
        for layer in self.layers:
            collected = (*collected, self.norm(x))
            x = layer(x)
        return self.norm(x)


class SequentialLoops(Lists):
    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        for norm in self.norms:
            x = norm(x)
        return x


@pytest.mark.parametrize("kind", [FinalNorm, SequentialLoops])
def test_what_is_used_after_the_loop_stays_with_the_head(kind: type[Lists]) -> None:
    names = [unit.name for unit in find_layer_units(kind())]
    assert names == ["embedding", *(f"layers.{i}" for i in range(DEPTH)), "head"]


class LowRank(nn.Module):
    """LoRA by hand: frozen layers, and matrices in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)).requires_grad_(False)
        self.down = nn.ParameterList(torch.zeros(WIDTH, 2) for _ in range(DEPTH))
        self.up = nn.ParameterList(torch.zeros(2, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer, down, up in zip(self.layers, self.down, self.up, strict=True):
            x = layer(x) + x @ down @ up
        return x


class LowRankByIndex(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.nn.functional.linear(x, layer.weight + (self.down[i] @ self.up[i]).T)
        return x


class LowRankInHooks(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class LowRankBesideBlocks(LowRankInHooks):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH)).requires_grad_(False)


@pytest.mark.parametrize("kind", [LowRank, LowRankByIndex, LowRankInHooks, LowRankBesideBlocks])
def test_parameters_in_lists_are_a_stack(kind: type[nn.Module]) -> None:
    units = find_layer_units(kind())
    together = kind in (LowRank, LowRankByIndex)
    assert len(units) == (DEPTH if together else 2 * DEPTH)
    assert len({unit.numel for unit in units}) == 1
    if together:
        assert [set(unit.parameters) for unit in units] == [{f"down.{i}", f"up.{i}"} for i in range(DEPTH)]


class Stages(nn.Module):
    """Downsampling and stages by turns, as in ConvNeXt's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(3))
        self.stages = nn.ModuleList(nn.Sequential(Block(), Block()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = self.stages[i](self.downs[i](x))
        return x


def test_stages_in_turns_are_opened_in_their_order() -> None:
    first, *rest = [unit.name for unit in find_layer_units(Stages())]
    stages = [[f"stages.{i}.0", f"stages.{i}.1"] for i in range(3)]
    assert (first, rest) == ("embedding", [*stages[0], "downs.1", *stages[1], "downs.2", *stages[2]])


def test_steps_name_the_members_of_lists_by_their_paths() -> None:
    steps = [[path for path, _ in step.members] for step in steps_in_forward_order(InADict())]
    turns = [[f"parts.layers.{i}", f"parts.norms.{i}"] for i in range(DEPTH)]
    assert steps == [["embed"], *turns, ["head"]]


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(WIDTH), lambda: nn.Linear(WIDTH, 3)])
def test_a_head_of_that_name_which_is_not_last_has_turns(make: Callable[[], nn.Module]) -> None:
    class HeadInside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(400, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
            self.last = make()

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.layers[0](self.embed(tokens))
            x = self.head(x)
            for layer in self.layers[1:]:
                x = layer(x)
            return self.last(x)

    model = HeadInside()
    names = [unit.name for unit in find_layer_units(model)]
    assert len(set(names)) == len(names)
    assert all(name != "head" or names[-1] == "head" for name in always_active(model))
