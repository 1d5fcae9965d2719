"""The largest layer units of models at their published sizes, as a table: ``python -m tests.groups.published_models``.

It needs timm and diffusers, and timm needs a torchvision that was built for the torch that is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_hift.groups.grouping import LayerUnit, find_layer_units
from lightning_hift.table import format_markdown

TABLE = Path(__file__).parents[2] / "examples" / "results" / "layer_units.md"
HEADER = ["model", "parameters", "units", "largest unit", "share"]

OF_TIMM = [
    "densenet121",
    "dla34",
    "edgenext_small",
    "efficientformer_l1",
    "levit_128",
    "mobilevit_xs",
    "nextvit_small",
    "regnetx_002",
    "shvit_s1",
    "swiftformer_s",
    "resnet50",
    "swin_tiny_patch4_window7_224",
    "vit_base_patch16_224",
]
_XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
OF_DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Stable Diffusion 1.5": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "Stable Diffusion XL": ("UNet2DConditionModel", _XL),
    **{
        name: (name, {})
        for name in [
            "AllegroTransformer3DModel",
            "AuraFlowTransformer2DModel",
            "AutoencoderOobleck",
            "CogVideoXTransformer3DModel",
            "ControlNetModel",
            "DiTTransformer2DModel",
            "FluxTransformer2DModel",
            "LTXVideoTransformer3DModel",
            "PriorTransformer",
            "PixArtTransformer2DModel",
            "SD3Transformer2DModel",
            "SanaTransformer2DModel",
            "UNet2DModel",
            "UNet3DConditionModel",
            "UNetMotionModel",
            "UNetSpatioTemporalConditionModel",
            "UVit2DModel",
            "WanTransformer3DModel",
        ]
    },
}


def models(library: str) -> Iterator[tuple[str, nn.Module]]:
    """Models of a library by name, without memory: of timm, one of each family, too."""
    package = importlib.import_module(library)
    with torch.device("meta"):
        if library == "diffusers":
            yield from ((name, getattr(package, cls)(**options)) for name, (cls, options) in OF_DIFFUSERS.items())
        else:
            families = [package.list_models(module=family) for family in package.list_modules()]
            first = [min(names, key=lambda name: (len(name), name)) for names in families if names]
            yield from ((name, package.create_model(name)) for name in sorted({*first, *OF_TIMM}))


def row(name: str, units: list[LayerUnit]) -> list[str]:
    """One of the table's."""
    total, largest = sum(unit.numel for unit in units), max(units, key=lambda unit: unit.numel)
    return [name, f"{total:,}", str(len(units)), largest.name, f"{100 * largest.numel / total:.1f} %"]


def main() -> None:
    """Write the table."""
    text = ["# The largest layer units at published sizes", "", *__doc__.splitlines()[:1]]
    for library in ("timm", "diffusers"):
        version = importlib.import_module(library).__version__
        rows = [row(name, find_layer_units(model)) for name, model in models(library)]
        text += ["", f"## {library} {version}", "", format_markdown(HEADER, rows)]
    TABLE.write_text("\n".join([*text, ""]))


if __name__ == "__main__":
    main()
