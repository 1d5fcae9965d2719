"""Fine-tuning by forward passes alone: MeZO (arXiv 2305.17333) and its sparse kind (arXiv 2402.15751)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_hift.engine.random_state import RandomState

_BACKWARD = (
    "MeZO takes no gradients, but its closure runs a backward pass. Let it return the loss of a forward pass alone."
    " With Lightning, derive from HiFTModule, as automatic optimization always runs one, or call"
    " optimizer.step(closure) in a training_step of your own."
)


class MeZO(Optimizer):
    """Steps along one random direction, by the difference of the loss on its two sides.

    All parameters with ``requires_grad`` move by ``+eps``, then ``-eps`` times a noise z, in place, and the loss is
    taken at both places; then they are put back, up to rounding (much of it in 16 bits), and stepped by
    ``-lr * (loss+ - loss-) / (2 eps) * z``. Noise is drawn anew from its seed wherever it is needed, so beside the
    weights there is memory for the noise of one parameter at a time and nothing else: no gradients, no moments, and no
    activations of a backward pass. Under HiFT only the active
    group is trainable, which makes MeZO block-wise.

    Both losses see the same dropout. Several processes draw the same noise, so their closures have to return the same
    loss: the mean of all, as in a ``HiFTModule``. The state is a number of steps per parameter, so that a resumed run
    draws the noise of one that was never interrupted.

    Args:
        params: As in ``torch.optim``.
        lr: Learning rate; two or three orders of magnitude below that of Adam.
        eps: How far the weights are moved to either side.
        weight_decay: Decoupled, as in AdamW.
        sparsity: The share of each tensor that is left alone, at least 0 and below 1: its larger weights (Sparse MeZO).
            Which these are is looked up at each step, and kept for its length: 1 byte per trainable element.
        seed: Seed of the noise.

    Raises:
        ValueError: An argument is out of range.
    """

    needs_gradient: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        sparsity: float = 0.0,
        seed: int = 0,
    ) -> None:
        if lr < 0 or eps <= 0 or weight_decay < 0 or not 0 <= sparsity < 1:
            raise ValueError(
                f"Got lr={lr}, eps={eps}, weight_decay={weight_decay}, sparsity={sparsity}; lr and weight_decay must be"
                " at least 0, eps above 0, sparsity at least 0 and below 1."
            )
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "sparsity": sparsity, "seed": seed}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: Returns the loss, by a forward pass and nothing else; it is called twice. If it returns ``None``,
                the weights stay as they are.

        Returns:
            The mean of the two losses.

        Raises:
            RuntimeError: There is no closure, or it runs a backward pass.
        """
        if closure is None:
            raise RuntimeError(
                "MeZO needs step(closure) with a closure that returns the loss. With Lightning, use a HiFTModule, as"
                " all tasks are; a GradScaler (precision='16-mixed') steps without closure: use '32-true' or"
                " 'bf16-mixed'."
            )
        moving = list(self._moving())
        random_state = RandomState.capture()
        losses: list[Any] = []
        place = 0
        try:
            for side in (1, -1):
                _move(moving, side - place)
                place = side
                random_state.restore()
                losses.append(_loss_of(closure, moving))
        finally:
            _move(moving, -place)
        if any(loss is None for loss in losses):
            return None
        for each in moving:
            each.step(losses[0] - losses[1])
            self.state[each.parameter]["step"] = each.steps + 1
        return (losses[0] + losses[1]) / 2

    def _moving(self) -> Iterator[_Moving]:
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    # Not by [], which would leave an entry for what is never stepped.
                    count = self.state.get(p, {}).get("step", 0)
                    # One that 32 bits hold: the generator of the CPU takes no more.
                    seed = zlib.crc32(f"{group['seed']} {count} {index}".encode())
                    yield _Moving(p, group, count, seed, _smaller_weights(p, group["sparsity"]))
                index += 1


class _Moving(NamedTuple):
    """A parameter in one step: its options, the steps it has made, the seed of its noise, and what of it may move."""

    parameter: nn.Parameter
    options: dict[str, Any]
    steps: int
    seed: int
    mask: Tensor | None

    def noise(self) -> Tensor:
        p = self.parameter
        generator = torch.Generator(p.device).manual_seed(self.seed)
        noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
        return noise if self.mask is None else noise.mul_(self.mask)

    def step(self, difference: Tensor) -> None:
        p, options = self.parameter, self.options
        lr, decay = options["lr"], options["weight_decay"]
        if decay:
            p.mul_(1 - lr * decay if self.mask is None else 1 - lr * decay * self.mask)
        slope = difference / (2 * options["eps"])
        # In 32 bits: in 16 the product may be too small to be a number.
        p.sub_(self.noise().to(torch.promote_types(p.dtype, torch.float32)).mul_(lr * slope))


def _move(moving: list[_Moving], places: int) -> None:
    if places:
        for each in moving:
            each.parameter.add_(each.noise(), alpha=places * each.options["eps"])
        torch.clear_autocast_cache()  # it holds casts of the weights as they were


def _smaller_weights(p: nn.Parameter, sparsity: float) -> Tensor | None:
    if not sparsity or not p.numel():
        return None
    size = p.abs()
    count = p.numel() - int(sparsity * p.numel())
    return size <= size.flatten().kthvalue(count).values


def _loss_of(closure: Callable[[], Any], moving: list[_Moving]) -> Any:
    try:
        loss = closure()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise RuntimeError(_BACKWARD) from error
    if any(each.parameter.grad is not None for each in moving):
        raise RuntimeError(_BACKWARD)
    return loss
