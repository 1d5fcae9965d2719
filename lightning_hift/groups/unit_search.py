"""Embedding, blocks and head of any module tree, in forward order, without a list of known architectures.

They are found from the shape of the tree and the source of ``forward`` alone:

- A *stack* is an ``nn.ModuleList``, ``nn.Sequential`` or ``nn.ParameterList``, children with numbered names
  (``self.layer1``, ``self.layer2``), or three or more blocks of one class side by side. Lists that a loop goes through
  together are one stack.
- Of what a stack is made of, that which has at least two layers with weights is a block. A convolution with its norm is
  only a layer. A stage, which is mostly made of a stack of such blocks, is opened, and so is any other that is made of
  them and holds too much of the model.
- What the forward pass uses before the first block is the embedding, what it uses after the last one is the head (with
  the final norm). What it uses between two stacks is a unit too, or two where it belongs to two towers.
- Where such a unit would be larger than the largest block, each layer that a stack has in it is a unit of its own, and
  where it holds too much of the model and is no embedding, each of its layers is.
- A model without any blocks (an MLP, a small CNN) has one unit per layer that holds parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import pairwise, takewhile
from typing import NamedTuple

from torch import nn

from lightning_hift.groups.alternation import steps_in_forward_order
from lightning_hift.groups.forward_order import Member

EMBEDDING, HEAD = "embedding", "head"
_MOST = 2 / 3
_TOO_MUCH = 0.3
_ENOUGH_SIBLINGS = 3
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class _Piece(NamedTuple):
    """A future unit, or a part of one: what a step of the forward pass uses, by paths."""

    members: tuple[tuple[str, Member], ...]
    is_block: bool
    in_stack: bool = False

    @property
    def path(self) -> str:
        return self.members[0][0]


def search_units(model: nn.Module, wanted: Collection[int] | None = None) -> list[tuple[str, list[tuple[str, Member]]]]:
    """Names of the units of ``model`` in forward order, with the paths and members that make up each.

    Tied and frozen parameters are still where the tree has them: the caller decides what counts.

    Args:
        model: Any module tree.
        wanted: Identities of the parameters that train; default: all do.
    """
    runs = _Search(model, wanted).runs()
    names = [run[0].path or type(model).__name__ for run in runs]
    if any(piece.is_block for run in runs for piece in run):
        if not runs[0][0].is_block and EMBEDDING not in names[1:]:
            names[0] = EMBEDDING
        if not runs[-1][0].is_block and HEAD not in names[:-1]:
            names[-1] = HEAD
    return [(name, [named for piece in run for named in piece.members]) for name, run in zip(names, runs, strict=True)]


class _Search:
    """One search, which knows how much of the model is too much for a unit that can be divided."""

    def __init__(self, model: nn.Module, wanted: Collection[int] | None) -> None:
        self._model = model
        self._wanted = wanted
        self._limit = _TOO_MUCH * _numel(model)

    def runs(self) -> list[list[_Piece]]:
        """Each block alone, and the loose pieces around the blocks joined: one future unit each.

        Between two blocks, what is nearer to the next one in the module tree opens a new run, so that the projector of
        one tower stays apart from the embedding of the next.
        """
        pieces = self._pieces(self._model, "")
        blocks = [i for i, piece in enumerate(pieces) if piece.is_block]
        if not blocks:
            return [[layer] for layer in _layers(_piece("", self._model))]
        runs: list[list[_Piece]] = []
        was_ahead = False
        for i, piece in enumerate(pieces):
            before, after = [b for b in blocks if b < i], [b for b in blocks if b > i]
            ahead = bool(before and after) and _shared(piece, pieces[after[0]]) > _shared(piece, pieces[before[-1]])
            if piece.is_block or not runs or runs[-1][0].is_block or ahead > was_ahead:
                runs.append([piece])
            else:
                runs[-1].append(piece)
            was_ahead = ahead
        most = max(_numel_of([pieces[i]]) for i in blocks)
        most_trained = max(self._trained([pieces[i]]) for i in blocks)
        parts = [part for run in runs for part in (_around_lists(run) if self._trained(run) > most_trained else [run])]
        met: set[int] = set()
        cut = parts[:1]
        for last, part in pairwise(parts):
            met |= {id(p) for p in _parameters(last)}
            cut += _divided(part, met) if _numel_of(part, met) > max(most, self._limit) else [part]
        return cut

    def _trained(self, run: list[_Piece]) -> int:
        return sum(p.numel() for p in _parameters(run) if self._wanted is None or id(p) in self._wanted)

    def _pieces(self, module: nn.Module, path: str, made_of_blocks: bool = False) -> list[_Piece]:
        """Blocks and, around them, loose modules and parameters, in forward order."""
        steps = steps_in_forward_order(module)
        in_stack = [member for step in steps for _, member in step.members if step.is_turn or _is_stack(module)]
        in_stack += [*_siblings(module), *(_inner_blocks(module) if made_of_blocks else [])]
        opened = {type(m) for m in in_stack if isinstance(m, nn.Module) and self._is_opened(m)}
        pieces: list[_Piece] = []
        for step in steps:
            found: list[list[_Piece]] = []
            for name, member in step.members:
                inner = join_path(path, name)
                is_part = any(member is m for m in in_stack)
                if isinstance(member, nn.Parameter):
                    found.append([_piece(inner, member, is_part)])
                elif is_part and type(member) in opened and (_is_stage(member) or _is_made_of_blocks(member)):
                    found.append(self._pieces(member, inner, made_of_blocks=not _is_stage(member)))
                elif not is_part and (_holds_stack(member) or self._is_opened(member)):
                    found.append(self._pieces(member, inner, made_of_blocks=not _holds_stack(member)))
                elif has_parameters(member):
                    found.append([_piece(inner, member, is_part)])
            is_turn = step.is_turn and all(len(part) == 1 for part in found)
            flat = [piece for part in found for piece in part]
            pieces += [_joined(flat)] if is_turn and flat else flat
        return pieces

    def _is_opened(self, module: nn.Module) -> bool:
        return _is_stage(module) or (_numel(module) > self._limit and _is_made_of_blocks(module))


def _around_lists(run: list[_Piece]) -> list[list[_Piece]]:
    """Loose pieces cut around each that is in a stack."""
    parts: list[list[_Piece]] = []
    for piece in run:
        if not parts or piece.in_stack or parts[-1][-1].in_stack:
            parts.append([])
        parts[-1].append(piece)
    return parts


def _divided(run: list[_Piece], met: Collection[int]) -> list[list[_Piece]]:
    """Loose pieces cut into their layers, unless one of these has nearly all parameters but those already met."""
    layers = [layer for piece in run for layer in _layers(piece, keep_blocks=True)]
    largest = max(_numel_of([layer], met) for layer in layers)
    return [[layer] for layer in layers] if largest <= _MOST * _numel_of(run, met) else [run]


def _piece(path: str, member: Member, in_stack: bool = False) -> _Piece:
    return _Piece(((path, member),), in_stack and _count_layers(member) > 1, in_stack)


def _joined(pieces: list[_Piece]) -> _Piece:
    """What one turn of a loop uses of several lists."""
    members = tuple(named for piece in pieces for named in piece.members)
    return _Piece(members, sum(_count_layers(member) for _, member in members) > 1, in_stack=True)


def _shared(a: _Piece, b: _Piece) -> int:
    """How many leading parts two paths have in common."""
    same = (x == y for x, y in zip(a.path.split("."), b.path.split("."), strict=False))
    return sum(1 for _ in takewhile(bool, same))


def _siblings(module: nn.Module) -> list[nn.Module]:
    """Children that are blocks and a stack without a list: their names are numbered, or three have the same class."""
    blocks = {name: c for name, c in module.named_children() if is_block(c) and not _holds_blocks(c)}
    if _is_stack(module):
        return []
    stems = Counter(re.sub(r"\d+", "*", name) for name in blocks)
    classes = Counter(type(c) for c in blocks.values() if not isinstance(c, _CONTAINERS))
    return [
        c
        for name, c in blocks.items()
        if classes[type(c)] >= _ENOUGH_SIBLINGS or (name[-1:].isdigit() and stems[re.sub(r"\d+", "*", name)] > 1)
    ]


def _is_stage(module: nn.Module) -> bool:
    """Whether a stack's child is only a wrapper of further blocks, like a stage of a Swin transformer or of a ResNet.

    Experts and attention heads are parallel parts of one block: unlike blocks, they have no norm of their own. The
    parts of a block, attention and MLP each with its norm, may be in a list, too, but differ in class.
    """
    if _is_stack(module):
        return any(is_block(child) for child in module.children())
    stacks = [_siblings(module), *(list(child.children()) for child in module.children() if _is_stack(child))]
    blocks = [block for stack in stacks for block in stack if _is_block_with_norm(block)]
    most = _MOST * _numel(module)
    if max(Counter(map(type, blocks)).values(), default=0) > 1 and sum(map(_numel, blocks)) >= most:
        return True
    return any(_numel(child) >= most and not _is_stack(child) and _is_stage(child) for child in module.children())


def _is_made_of_blocks(module: nn.Module) -> bool:
    """Whether there are two blocks with norms in it or more, neither in the other, so that it can be divided.

    Of one class, or each with several norms: attention and MLP with a norm each are the parts of one block.
    """
    blocks = _inner_blocks(module)
    repeats = len(set(map(type, blocks))) < len(blocks)
    return repeats or sum(_count_norms(b) > 1 for b in blocks) > 1 or any(map(_is_made_of_blocks, blocks))


def _inner_blocks(module: nn.Module) -> list[nn.Module]:
    """Outermost blocks with norms in a module, its lists opened."""
    blocks: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            blocks += _inner_blocks(child)
        elif _is_block_with_norm(child):
            blocks.append(child)
    return blocks


def _layers(piece: _Piece, keep_blocks: bool = False) -> list[_Piece]:
    """Cut a piece of a model into layers: one weight, or most of its weights its own, as in an LSTM.

    Args:
        piece: To be cut.
        keep_blocks: Leave a block with a norm whole.
    """
    if len(piece.members) > 1:
        return [piece]
    ((path, module),) = piece.members
    if isinstance(module, nn.Parameter) or (keep_blocks and _is_block_with_norm(module)):
        return [piece]
    own = sum(p.numel() for p in module.parameters(recurse=False))
    if not is_block(module) or (2 * own >= _numel(module) and not isinstance(module, nn.ParameterList)):
        return [piece]
    steps = steps_in_forward_order(module)
    found: list[_Piece] = []
    for step in steps:
        parts = [
            _piece(join_path(path, name), m)
            for name, m in step.members
            if isinstance(m, nn.Parameter) or has_parameters(m)
        ]
        found += [layer for part in parts for layer in _layers(part, keep_blocks)]
    return found


def join_path(path: str, name: str) -> str:
    """``path.name``, where either may be empty."""
    return f"{path}.{name}" if path and name else path or name


def has_parameters(module: nn.Module) -> bool:
    """Whether there is any parameter in ``module``."""
    return any(True for _ in module.parameters())


def is_block(module: nn.Module) -> bool:
    """Whether a module is made of at least two layers that hold a weight of two dimensions: no norm, bias or scale."""
    return _count_layers(module) > 1


def _count_layers(member: Member) -> int:
    if isinstance(member, nn.Parameter):
        return int(member.ndim > 1)
    matrices = [(m, sum(p.ndim > 1 for p in m.parameters(recurse=False))) for m in member.modules()]
    return sum(count if isinstance(m, nn.ParameterList) else bool(count) for m, count in matrices)


def _is_block_with_norm(module: nn.Module) -> bool:
    return is_block(module) and _count_norms(module) > 0


def _count_norms(module: nn.Module) -> int:
    return sum("norm" in type(m).__name__.lower() for m in module.modules())


def _is_stack(module: nn.Module) -> bool:
    if isinstance(module, nn.ParameterList):
        return has_parameters(module)
    return (
        isinstance(module, (nn.ModuleList, nn.Sequential))
        and not any(True for _ in module.parameters(recurse=False))  # a parametrization is a list with its own weights
        and has_parameters(module)
    )


def _holds_stack(module: nn.Module) -> bool:
    return any(_is_stack(m) or _siblings(m) for m in module.modules())


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module is a tower: it has a stack of two or more blocks somewhere inside."""
    return any(_is_stack(m) and sum(map(is_block, m.children())) > 1 for m in module.modules())


def _parameters(run: Iterable[_Piece]) -> list[nn.Parameter]:
    members = [member for piece in run for _, member in piece.members]
    return [p for m in members for p in ([m] if isinstance(m, nn.Parameter) else m.parameters())]


def _numel_of(run: Iterable[_Piece], without: Collection[int] = ()) -> int:
    return sum(p.numel() for p in {id(p): p for p in _parameters(run) if id(p) not in without}.values())


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
