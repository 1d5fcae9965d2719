"""What is said of weights that will not train as they should, in a Trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch import nn
from torch.optim import Optimizer

from lightning_hift.engine.engine import HiFTEngine
from lightning_hift.engine.optimizer_state import parameters_of
from lightning_hift.engine.parameter_checks import find_replaced
from lightning_hift.precision.master_weights import HALF_DTYPES


def warn_about_rounding(optimizers: Sequence[Optimizer], module: nn.Module, plugin: Precision) -> None:
    """Warn where weights in 16 bits are stepped without masters.

    Args:
        optimizers: Those of the Trainer. What moves weights without gradients cannot have masters anyway.
        module: What is trained.
        plugin: The Trainer's precision.
    """
    if isinstance(plugin, HalfPrecision):
        rank_zero_warn(
            f"precision={plugin.precision!r} rounds each update to 16 bits; small updates are lost. Use"
            " strategy='hift', which keeps master weights, or '32-true' or 'bf16-mixed'."
        )
        return
    stepped = {p for each in optimizers if getattr(each, "needs_gradient", True) for p in parameters_of(each)}
    trained = [(name, p) for name, p in module.named_parameters() if p in stepped and p.requires_grad]
    halves = [(name, p) for name, p in trained if p.dtype in HALF_DTYPES]
    if halves:
        dtypes = {p.dtype for _, p in halves}
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        remedy = "bf16-true" if torch.bfloat16 in dtypes else "16-true"
        rank_zero_warn(
            f"{len(halves)} of {len(trained)} trainable parameters are {names} ({halves[0][0]}, ...) with"
            f" precision={plugin.precision!r}, and HiFTCallback alone keeps no master weights: each update is rounded"
            f" to 16 bits, and small ones are lost. Use strategy='hift' with precision={remedy!r}, which keeps masters,"
            " or load the model in float32 (model.float(), or dtype=torch.float32 in from_pretrained)."
        )


def warn_about_replaced(engines: Sequence[HiFTEngine], module: nn.Module) -> None:
    """Warn of parameters that have come or gone since layer groups were formed; right before the first batch.

    Args:
        engines: One for each optimizer.
        module: What is trained.
    """
    parameters = {name: p for engine in engines for name, p in engine.parameters.items()}
    gone, new = find_replaced(module, [engine.optimizer for engine in engines], parameters)
    facts = [f"{_few(new)} are trainable, but no optimizer holds them, so they will not train"] if new else []
    facts += [f"{_few(gone)} are not in the module any more, so their turns change nothing"] if gone else []
    if facts:
        rank_zero_warn(
            f"The module is not the one of which layer groups were formed: {'; '.join(facts)}. Replace or resize layers"
            " (resize_token_embeddings, a new head) before the optimizer is built: in __init__, configure_model or"
            " setup, not in on_fit_start or later. What is not to train wants requires_grad_(False)."
        )


def explain_frozen(exception: BaseException) -> None:
    """Add to an error of ``torch.autograd.grad`` that HiFT has frozen what it asks about (since Python 3.11)."""
    if "differentiated Tensors does not require grad" in str(exception) and hasattr(exception, "add_note"):
        exception.add_note(
            "HiFT freezes all layer groups but the active one. Ask autograd.grad for the parameters with requires_grad"
            " alone, name in always_active=[...] what is needed at every step, or use one group of all units."
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)} parameters)" if len(names) > 4 else "")
