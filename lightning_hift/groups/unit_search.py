"""Embedding, blocks and head of any module tree, in forward order, without a list of known architectures.

They are found from the shape of the tree alone:

- A *stack* is an outermost ``nn.ModuleList`` or ``nn.Sequential``; each of its children that is made of at least two
  layers with weights is a block. A convolution with its norm is only a layer.
- What the forward pass uses before the first block is the embedding, what it uses after the last one is the head (with
  the final norm). What it uses between two stacks is a unit too, or two where it belongs to two towers.
- Where such a unit would be larger than the largest block, each layer that a stack has in it is a unit of its own.
- Three or more blocks of one class side by side are a stack too (``self.layer1``, ``self.layer2``, ...).
- A model without any blocks (an MLP, a small CNN) has one unit per layer that holds parameters.
"""

from __future__ import annotations

from collections import Counter
from itertools import takewhile
from typing import NamedTuple

from torch import nn

from lightning_hift.groups.forward_order import members_in_forward_order

EMBEDDING, HEAD = "embedding", "head"
_STAGE_SHARE = 2 / 3
_ENOUGH_SIBLINGS = 3
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class _Piece(NamedTuple):
    path: str
    member: nn.Module | nn.Parameter
    is_block: bool
    in_stack: bool = False

    @property
    def numel(self) -> int:
        return self.member.numel() if isinstance(self.member, nn.Parameter) else _numel(self.member)


def search_units(model: nn.Module) -> list[tuple[str, list[tuple[str, nn.Module | nn.Parameter]]]]:
    """Names of the units of ``model`` in forward order, with the paths and members that make up each.

    Tied and frozen parameters are still where the tree has them: the caller decides what counts.
    """
    pieces = _pieces(model, "")
    in_blocks = any(piece.is_block for piece in pieces)
    runs = _runs(pieces) if in_blocks else [[layer] for layer in _layers(_Piece("", model, is_block=False))]
    names = [run[0].path or type(model).__name__ for run in runs]
    if in_blocks and not runs[0][0].is_block:
        names[0] = EMBEDDING
    if in_blocks and not runs[-1][0].is_block:
        names[-1] = HEAD
    return [(name, [(piece.path, piece.member) for piece in run]) for name, run in zip(names, runs, strict=True)]


def _runs(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Each block alone, and the loose pieces around the blocks joined: one future unit each.

    Between two blocks, what is nearer to the next one in the module tree opens a new run, so that the projector of one
    tower stays apart from the embedding of the next.
    """
    blocks = [i for i, piece in enumerate(pieces) if piece.is_block]
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
    largest = max(pieces[i].numel for i in blocks)
    return [part for run in runs for part in _cut(run, largest)]


def _cut(run: list[_Piece], most: int) -> list[list[_Piece]]:
    """A run of loose pieces with at most so many elements, or cut around each piece of a stack."""
    if sum(piece.numel for piece in run) <= most:
        return [run]
    parts: list[list[_Piece]] = []
    for piece in run:
        if not parts or piece.in_stack or parts[-1][-1].in_stack:
            parts.append([])
        parts[-1].append(piece)
    return parts


def _shared(a: _Piece, b: _Piece) -> int:
    """How many leading parts two paths have in common."""
    same = (x == y for x, y in zip(a.path.split("."), b.path.split("."), strict=False))
    return sum(1 for _ in takewhile(bool, same))


def _pieces(module: nn.Module, path: str) -> list[_Piece]:
    """Blocks and, around them, loose modules and parameters, in forward order."""
    if _is_stack(module):
        return [
            piece for name, child in module.named_children() for piece in _stack_pieces(child, join_path(path, name))
        ]
    siblings = _siblings(module)
    pieces: list[_Piece] = []
    for name, member in members_in_forward_order(module):
        if isinstance(member, nn.Parameter):
            pieces.append(_Piece(join_path(path, name), member, is_block=False))
        elif type(member) in siblings:
            pieces += _stack_pieces(member, join_path(path, name))
        elif any(_is_stack(inner) or _siblings(inner) for inner in member.modules()):
            pieces += _pieces(member, join_path(path, name))
        elif has_parameters(member):
            pieces.append(_Piece(join_path(path, name), member, is_block=False))
    return pieces


def _siblings(module: nn.Module) -> set[type]:
    """Classes of at least three children that are blocks, like ``self.layer1``, ``self.layer2``, ``self.layer3``."""
    counts: Counter[type] = Counter(type(c) for c in module.children() if is_block(c) and not _holds_blocks(c))
    return {cls for cls, count in counts.items() if count >= _ENOUGH_SIBLINGS and not issubclass(cls, _CONTAINERS)}


def _stack_pieces(child: nn.Module, path: str) -> list[_Piece]:
    """One child of a stack: a block, or a stage that is itself made of blocks, or a plain layer."""
    if not has_parameters(child):
        return []
    if _is_stage(child):
        return _pieces(child, path)
    return [_Piece(path, child, is_block=is_block(child), in_stack=True)]


def _is_stage(module: nn.Module) -> bool:
    """Whether a stack's child is only a wrapper of further blocks, like a stage of a Swin transformer or of a ResNet.

    Experts and attention heads are parallel parts of one block: unlike blocks, they have no norm of their own.
    """
    if _is_stack(module):
        return any(is_block(child) for child in module.children())
    for child in module.children():
        blocks = [b for b in child.children() if has_parameters(b)] if _is_stack(child) else []
        if (
            len(blocks) > 1
            and len({type(b) for b in blocks}) == 1
            and all(is_block(b) and any("norm" in type(m).__name__.lower() for m in b.modules()) for b in blocks)
            and _numel(child) >= _STAGE_SHARE * _numel(module)
        ):
            return True
    return False


def _layers(piece: _Piece) -> list[_Piece]:
    """Cut a piece of a model without blocks into layers: one weight, or most of its weights its own, as in an LSTM."""
    module = piece.member
    if isinstance(module, nn.Parameter):
        return [piece]
    own = sum(p.numel() for p in module.parameters(recurse=False))
    if not is_block(module) or 2 * own >= _numel(module):
        return [piece]
    members = [
        (name, member)
        for name, member in members_in_forward_order(module)
        if isinstance(member, nn.Parameter) or has_parameters(member)
    ]
    return [layer for n, m in members for layer in _layers(_Piece(join_path(piece.path, n), m, is_block=False))]


def join_path(path: str, name: str) -> str:
    """``path.name``, where either may be empty."""
    return f"{path}.{name}" if path and name else path or name


def has_parameters(module: nn.Module) -> bool:
    """Whether there is any parameter in ``module``."""
    return any(True for _ in module.parameters())


def _is_stack(module: nn.Module) -> bool:
    return (
        isinstance(module, (nn.ModuleList, nn.Sequential))
        and not any(True for _ in module.parameters(recurse=False))  # a parametrization is a list with its own weights
        and has_parameters(module)
    )


def is_block(module: nn.Module) -> bool:
    """Whether a module is made of at least two layers that hold a weight of two dimensions: no norm, bias or scale."""
    return sum(any(p.ndim > 1 for p in m.parameters(recurse=False)) for m in module.modules()) > 1


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module is a tower: it has a stack of two or more blocks somewhere inside."""
    return any(_is_stack(m) and sum(map(is_block, m.children())) > 1 for m in module.modules())


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
