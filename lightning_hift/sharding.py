"""Shards a module over processes with torch's ``fully_shard`` (FSDP2), one block at a time.

Each block is gathered for its forward pass and again for its backward pass. What is in no block (embeddings, norms,
head) is gathered for a whole step, so that code outside its modules' ``forward`` may use it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_hift.grouping import find_layer_units
from lightning_hift.module import HiFTModule
from lightning_hift.sharded_tensors import is_sharded

_EVALUATION_STEPS = ("validation_step", "test_step", "predict_step")


def is_sharded_module(module: nn.Module) -> bool:
    """Whether something in ``module`` has been under ``fully_shard``."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def shard(
    module: pl.LightningModule,
    mesh: DeviceMesh,
    prepare: Callable[[Tensor], Any],
    units: Sequence[str | Sequence[str]] | None = None,
    reshard_after_forward: bool | int = True,
) -> None:
    """Shard ``module`` in place; its parameters become ``DTensor`` s, each process holding some of their rows.

    Args:
        module: On the host, or wherever it fits.
        mesh: The processes, in one dimension.
        prepare: Called with each parameter and buffer while it is whole.
        units: As of ``find_layer_units``.
        reshard_after_forward: Free the weights of a block after its forward pass, to be gathered again for its
            backward pass. A number: divide them among so many processes meanwhile.

    Raises:
        ValueError: Parameters belong to the LightningModule itself, in manual optimization.
    """
    roots = _roots(module)
    prepared: set[Tensor] = set()
    for part in (*find_blocks(module, units), module):
        for tensor in (*part.parameters(), *part.buffers()):
            if not is_sharded(tensor) and tensor not in prepared:
                prepare(tensor.detach())
                prepared.add(tensor)
        if part is not module:
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)
    for root in roots:
        fully_shard(root, mesh=mesh, reshard_after_forward=False)
    if isinstance(module, FSDPModule):
        step = "training_loss" if isinstance(module, HiFTModule) else "training_step"
        for name in (step, *_EVALUATION_STEPS):
            if name == "training_loss" or is_overridden(name, module):
                register_fsdp_forward_method(module, name)


def find_blocks(module: nn.Module, units: Sequence[str | Sequence[str]] | None = None) -> list[nn.Module]:
    """The modules that are layer units by themselves and share no parameter with any other module."""
    uses: dict[int, int] = {}
    for _, p in module.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    found = []
    is_trainable = any(p.requires_grad for p in module.parameters())
    for unit in find_layer_units(module, units) if is_trainable else ():
        if unit.name in unit.modules and len(unit.modules) == 1:
            block = module.get_submodule(unit.name)
            own = [id(p) for _, p in block.named_parameters(remove_duplicate=False)]
            if all(own.count(i) == uses[i] for i in own) and type(block).forward is not nn.Module.forward:
                found.append(block)
    return found


def reshard(module: nn.Module) -> None:
    """Free what was gathered. Weights that stayed gathered would not notice that others train from now on."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _roots(module: pl.LightningModule) -> list[nn.Module]:
    """What is gathered for a whole step: the module itself, where one call computes the loss and nothing else."""
    if isinstance(module, HiFTModule) or module.automatic_optimization:
        return [module]
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise ValueError(
            f"{type(module).__name__} has the parameters {own[:8]} of its own and optimizes manually, so they could be"
            " gathered in none of its methods. Put them into a submodule that has a forward."
        )
    return list(_callable_parts(module.children()))


def _callable_parts(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for module in modules:
        if type(module).forward is nn.Module.forward or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            yield from _callable_parts(module.children())
        elif any(True for _ in module.parameters()):
            yield module
