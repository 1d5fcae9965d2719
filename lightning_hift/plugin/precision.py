"""Weights in 16 bits with masters in 32: what the paper calls Mixed^Hi."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hift.engine.engine import HiFTEngine


class HiFTPrecision(HalfPrecision):
    """Lightning's 16-bit precision, but each update is made in 32 bits, on the active group's master weights.

    ``HiFTStrategy`` takes it by itself for ``precision="bf16-true"`` and ``"16-true"`` unless told to keep no masters.
    Models are built in 32 bits, for the masters to be taken from. Gradients are clipped in 32 bits. With ``"16-true"``
    the loss is scaled; a step whose gradients overflow is skipped and leaves weights, state and step counts alone.

    Args:
        precision: ``"bf16-true"`` or ``"16-true"``.
        scaler: For ``"16-true"``; default: ``torch.amp.GradScaler``.

    Raises:
        ValueError: There is a ``scaler``, but bfloat16 needs none.
    """

    def __init__(
        self, precision: Literal["bf16-true", "16-true"] = "bf16-true", scaler: torch.amp.GradScaler | None = None
    ) -> None:
        super().__init__(precision)
        if scaler is not None and precision == "bf16-true":
            raise ValueError("Got a scaler with precision='bf16-true', whose range needs none. Leave it out.")
        self.scaler = scaler

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the weights outside their step."""
        return self._desired_input_dtype

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @override
    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        if self.scaler is not None:
            tensor = self.scaler.scale(tensor)
        return super().pre_backward(tensor, module)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        engine = _engine_of(optimizer)
        try:
            if self.scaler is None:
                return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
            result = closure()
            # In manual optimization the closure returns nothing; in automatic, nothing means that there was no loss.
            has_gradients = result is not None or not model.automatic_optimization
            if not has_gradients:
                self._after_closure(model, optimizer)
                return result
            engine.prepare_step()  # in float16, small gradients would be lost in being unscaled
            self.scaler.unscale_(optimizer)
            self._after_closure(model, optimizer)
            output = self.scaler.step(optimizer, **kwargs)
            self.scaler.update()
            return output
        finally:
            engine.cancel_step()

    @override
    def _after_closure(self, model: pl.LightningModule, optimizer: Any) -> None:
        _engine_of(optimizer).prepare_step(slices=False)
        super()._after_closure(model, optimizer)

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if clip_val > 0:
            _engine_of(optimizer).prepare_step()
        super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    def make_scaler(self, device: torch.device) -> None:
        """Make the scaler of ``"16-true"``, if there is none yet."""
        if self.precision == "16-true" and self.scaler is None:
            self.scaler = torch.amp.GradScaler(device=device.type)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scaler is not None and state_dict:
            self.scaler.load_state_dict(state_dict)


def pass_without_gradients(plugin: Precision, optimizer: Optimizer) -> None:
    """Let a scaler step an optimizer none of whose parameters has a gradient: it found nothing that overflowed.

    Args:
        plugin: Of the Trainer; its scaler, if it has one, has unscaled the gradients.
        optimizer: What is to be stepped.
    """
    scaler = getattr(plugin, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        if not found:  # which the scaler takes for a mistake
            found[scaler._scale.device] = torch.zeros_like(scaler._scale)


def _engine_of(optimizer: Any) -> HiFTEngine:
    engine: HiFTEngine | None = getattr(optimizer, "_hift_engine", None)
    if engine is None:
        raise MisconfigurationException(
            f"HiFTPrecision found no master weights for {type(optimizer).__name__}. It works with strategy='hift' only;"
            " elsewhere use Lightning's own precision='bf16-true'."
        )
    return engine
