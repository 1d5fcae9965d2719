"""What of transformers' Trainer does not go with HiFT, in words and with the remedy."""

from __future__ import annotations

import warnings
from typing import Any

import torch

_ONE_DEVICE = (
    "Start one process (python, not torchrun or accelerate launch) that sees one GPU (CUDA_VISIBLE_DEVICES=0). On"
    " several GPUs, train with Lightning's Trainer and strategy='hift_ddp' or 'hift_fsdp'."
)
_NOT_NEEDED = (
    "Leave it out: HiFT keeps the optimizer state of one layer group on the device, and the rest on the host. If the"
    " weights do not fit, train with Lightning's Trainer and strategy='hift_fsdp'."
)


def refuse_unsupported(trainer: Any) -> None:
    """Refuse a ``transformers.Trainer`` that would train the wrong parameters, or nothing, without an error.

    Raises:
        ValueError: As said.
    """
    args = trainer.args
    optim = str(getattr(args.optim, "value", args.optim))
    found = {
        "DeepSpeed": (trainer.is_deepspeed_enabled, _NOT_NEEDED),
        "FSDP": (trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled, _NOT_NEEDED),
        f"{args.world_size} processes": (args.world_size > 1, _ONE_DEVICE),
        f"DataParallel on {args.n_gpu} GPUs": (args.n_gpu > 1, _ONE_DEVICE),
        "a model on several devices": (
            trainer.is_model_parallel or getattr(trainer, "is_distributed_loading_by_transformers", False),
            f"Load it without device_map and distributed_config. {_ONE_DEVICE}",
        ),
        f"device {args.device}": (args.device.type == "xla", "Use a CUDA GPU, MPS or a CPU."),
        f"optim={optim!r}": (
            "layerwise" in optim or "lomo" in optim,
            "It steps during the backward pass. Use optim='adamw_torch', or the same one without layerwise.",
        ),
        "this version of transformers": (
            not hasattr(trainer, "_prepare_for_training"),
            "Its Trainer loads checkpoints at another time. Use transformers>=5.4.",
        ),
    }
    for what, (is_so, remedy) in found.items():
        if is_so:
            raise ValueError(f"HiFT does not go with {what} in transformers' Trainer. {remedy}")


def warn_about_compilation(trainer: Any, num_groups: int) -> None:
    """Warn where torch would give up compiling, without an error, because each layer group makes a graph of its own."""
    if not trainer.args.torch_compile or trainer.accelerator.state.dynamo_plugin.use_regional_compilation:
        return
    limit = torch._dynamo.config.recompile_limit
    if num_groups + 1 > limit:
        warnings.warn(
            f"torch_compile compiles the whole model, once for each of {num_groups} layer groups, and torch falls back"
            f" to eager after {limit} graphs (torch._dynamo.config.recompile_limit). Compile block by block instead:"
            " leave torch_compile out and call block.compile() for each block before train.",
            stacklevel=2,
        )
