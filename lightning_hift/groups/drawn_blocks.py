"""Policies that train some blocks, drawn every so many steps: LISA and IST."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_hift.groups.grouping import LayerGroup
from lightning_hift.groups.selection import SelectionPolicy, StateHandling, check_count, check_state_handling

_Drawn = TypeVar("_Drawn", bound="_DrawnBlocks")


class _DrawnBlocks(SelectionPolicy):
    """Trains some blocks, drawn anew every so many steps, beside what is always active. A sweep is one draw."""

    always_active = ("embedding", "head")

    def __init__(self, num_blocks: int, steps_per_draw: int, state_handling: StateHandling) -> None:
        check_count("num_blocks", num_blocks)
        check_count("steps_per_draw", steps_per_draw)
        check_state_handling(state_handling)
        self.num_blocks = num_blocks
        self.steps_per_draw = steps_per_draw
        self.state_handling = state_handling

    @property
    def steps_per_sweep(self) -> int:
        """Optimizer steps of one draw."""
        return self.steps_per_draw

    @property
    def most_groups(self) -> int:
        """The number of blocks in a draw."""
        return self.num_blocks

    def bound_to(self: _Drawn, groups: Sequence[LayerGroup], seed: int = 0) -> _Drawn:
        """See ``SelectionPolicy``.

        Raises:
            ValueError: There are fewer groups than blocks in a draw.
        """
        if self.num_blocks > len(groups):
            raise ValueError(
                f"Got num_blocks={self.num_blocks} for {type(self).__name__}, but only {len(groups)} layer groups take"
                " turns. Draw at most as many, use a smaller group_size, or name fewer units in always_active=[...]."
            )
        return super().bound_to(groups, seed)


class LISA(_DrawnBlocks):
    """Blocks drawn with equal chances, embedding and head always active (LISA, arXiv 2403.17919).

    The state of each drawn block comes and goes at every step, so that the device holds that of one block at a time
    beside what is always active; the paper keeps it there.

    Args:
        num_blocks: Layer groups that train at once; gamma in the paper.
        steps_per_draw: Optimizer steps until others are drawn; K in the paper.
        state_handling: ``"keep"`` the optimizer state of a block until it is drawn again, or ``"reset"`` it.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, num_blocks: int = 2, steps_per_draw: int = 20, state_handling: StateHandling = "keep") -> None:
        super().__init__(num_blocks, steps_per_draw, state_handling)

    def groups_at(self, step: int) -> tuple[int, ...]:
        """The blocks of this draw."""
        draw = random.Random(f"{self.seed}/{step // self.steps_per_draw}")
        return tuple(sorted(draw.sample(range(len(self.groups)), self.num_blocks)))


class IST(_DrawnBlocks):
    """Blocks drawn by an importance that is learned while training (after IST, arXiv 2410.11772).

    A block's score rises if the loss fell faster than usual while the block was trained. With scores s the chance to be
    drawn first is (1 - explore) softmax(s) + explore / number of blocks. This departs from the paper, which trains
    adapters and scores blocks in extra forward passes, by how much the loss suffers when their output is suppressed:
    here the losses of the training steps themselves are compared, draw by draw, which costs nothing and is noisier.

    In a plain torch loop, hand over each loss: ``engine.observe(loss)`` before ``optimizer.step()``.

    Args:
        num_blocks: Layer groups that train at once.
        steps_per_draw: Optimizer steps until others are drawn.
        importance_rate: How far a draw can move the scores of its blocks.
        explore: Share of the chances that is the same for all blocks, above 0 so that none is given up, at most 1.
        state_handling: ``"keep"`` the optimizer state of a block until it is drawn again, or ``"reset"`` it.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: At the end of a draw: no loss was ever handed over.
    """

    def __init__(
        self,
        num_blocks: int = 2,
        steps_per_draw: int = 20,
        importance_rate: float = 0.5,
        explore: float = 0.2,
        state_handling: StateHandling = "keep",
    ) -> None:
        super().__init__(num_blocks, steps_per_draw, state_handling)
        if not importance_rate > 0:
            raise ValueError(f"Got importance_rate={importance_rate}; it must be above 0.")
        if not 0 < explore <= 1:
            raise ValueError(f"Got explore={explore}; it must be above 0, and 1 at most.")
        self.importance_rate = importance_rate
        self.explore = explore
        self._draw = 0
        self._drawn: tuple[int, ...] = ()
        self._scores: list[float] = []
        self._last: float | None = None  # mean loss of the draw before
        self._usual: float | None = None  # by how much it falls from draw to draw
        self._spread = 0.0  # how far that varies
        self._sum: Tensor | None = None
        self._count = 0

    def bound_to(self, groups: Sequence[LayerGroup], seed: int = 0) -> IST:
        """See ``SelectionPolicy``."""
        bound = super().bound_to(groups, seed)
        bound._scores = [0.0] * len(groups)
        bound._drawn = bound._new_draw()
        return bound

    @property
    def importance(self) -> list[float]:
        """The chances of all groups to be drawn first."""
        top = max(self._scores)
        weights = [math.exp(score - top) for score in self._scores]
        return [(1 - self.explore) * w / sum(weights) + self.explore / len(weights) for w in weights]

    def groups_at(self, step: int) -> tuple[int, ...]:
        """The blocks of this draw; with the first step of a new one, learns from the one before."""
        draw = step // self.steps_per_draw
        if draw < self._draw:
            raise RuntimeError(
                f"Got step={step}, but IST has gone on: it knows steps from {self.steps_per_draw * self._draw}."
            )
        while self._draw < draw:
            self._learn()
            self._draw += 1
            self._drawn = self._new_draw()
        return self._drawn

    def observe(self, step: int, loss: Tensor) -> None:
        """Add a loss to those of this draw."""
        self.groups_at(step)
        loss = loss.detach().float().mean()
        self._sum = loss if self._sum is None else self._sum.to(loss.device) + loss
        self._count += 1

    def _learn(self) -> None:
        if self._sum is None:
            if self._last is None:
                raise RuntimeError(
                    "IST learns from the losses of the training steps, and got none. In a plain loop call"
                    " engine.observe(loss) before optimizer.step(); in a Trainer let training_step return the loss, or"
                    " pass it to self.manual_backward."
                )
            return
        mean, last = float(self._sum) / self._count, self._last
        self._sum, self._count = None, 0
        if not math.isfinite(mean):
            return
        self._last = mean
        if last is None:
            return
        fall = last - mean
        surplus = 0.0 if self._usual is None else fall - self._usual
        self._usual = fall if self._usual is None else self._usual + 0.1 * surplus
        self._spread = max(abs(surplus), 0.9 * self._spread)
        for index in self._drawn:
            self._scores[index] += self.importance_rate * surplus / (self._spread or 1.0)

    def _new_draw(self) -> tuple[int, ...]:
        draw, left, chances = random.Random(f"{self.seed}/{self._draw}"), list(range(len(self.groups))), self.importance
        drawn = []
        for _ in range(self.num_blocks):
            (index,) = draw.choices(left, [chances[i] for i in left])
            left.remove(index)
            drawn.append(index)
        return tuple(sorted(drawn))

    def state_dict(self) -> dict[str, Any]:
        """Scores, the draw under way, and its losses so far."""
        return {
            "draw": self._draw,
            "drawn": list(self._drawn),
            "scores": list(self._scores),
            "last": self._last,
            "usual": self._usual,
            "spread": self._spread,
            "sum": None if self._sum is None else float(self._sum),
            "count": self._count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``SelectionPolicy``."""
        self._draw, self._drawn, self._scores = state["draw"], tuple(state["drawn"]), list(state["scores"])
        self._last, self._usual, self._spread = state["last"], state["usual"], state["spread"]
        self._sum = None if state["sum"] is None else torch.tensor(state["sum"], dtype=torch.float32)
        self._count = state["count"]
