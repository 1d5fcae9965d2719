"""Shards a module over processes with torch's ``fully_shard`` (FSDP2), one block at a time.

Each block is gathered for its forward pass and again for its backward pass. What is in no block (embeddings, norms,
head) is gathered for a whole step, so that code outside its modules' ``forward`` may use it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_hift.groups.grouping import LayerUnit, find_layer_units
from lightning_hift.offload.sharded_tensors import is_sharded
from lightning_hift.plugin.module import HiFTModule

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
) -> BackwardPrefetch:
    """Shard ``module`` in place; its parameters become ``DTensor`` s, each process holding some of their rows.

    Args:
        module: On the host, or wherever it fits.
        mesh: The processes, in one dimension.
        prepare: Called with each parameter and buffer while it is whole.
        units: As of ``find_layer_units``.
        reshard_after_forward: Free the weights of a block after its forward pass, to be gathered again for its
            backward pass. A number: divide them among so many processes meanwhile.

    Returns:
        What has to follow which parameters train.

    Raises:
        ValueError: Parameters belong to the LightningModule itself, in manual optimization.
    """
    roots = _roots(module)
    prepared: set[Tensor] = set()
    is_trainable = any(p.requires_grad for p in module.parameters())
    found = find_layer_units(module, units) if is_trainable else []
    blocks = _find_blocks(module, found)
    for part in (*blocks.values(), module):
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
    return BackwardPrefetch(module, {unit: blocks.get(unit) for unit in found}, roots)


def look_at_dtypes(module: nn.Module) -> None:
    """Let FSDP2 see in which dtypes gradients are, while all that will ever train is trainable.

    It looks at the first forward pass, and at what is trainable then, which under HiFT is one group.

    Raises:
        ValueError: Parameters that are sharded together have different dtypes.
    """
    inner: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, FSDPModule) and part not in inner:
            inner.update(part.modules())
            try:
                cast(Any, fully_shard).state(part)._lazy_init()
            except AssertionError as error:
                raise ValueError(
                    f"{error} Parameters of one block are sharded together, and so are those that are in no block."
                    " Convert all to one dtype, use precision='bf16-true', or call fully_shard in configure_model on"
                    " those of another dtype by themselves."
                ) from error


class BackwardPrefetch:
    """Keeps FSDP2 from gathering a block that the backward pass will not come to.

    While the backward pass is in one block, FSDP2 gathers the one below. Below the lowest unit that trains, nobody
    needs it and nobody frees it.

    Args:
        module: Sharded.
        units: All layer units in forward order, each with its block, if it is one.
        roots: What is gathered for a whole step.
    """

    def __init__(
        self, module: nn.Module, units: Mapping[LayerUnit, nn.Module | None], roots: Sequence[nn.Module]
    ) -> None:
        self._module = module
        self._root = roots[0] if len(roots) == 1 else None
        self._parts = [self._root if block is None else block for block in units.values()]
        self._names = [list(unit.parameters) for unit in units]

    def follow(self) -> None:
        """To be called whenever other parameters train."""
        trains = [any(self._module.get_parameter(name).requires_grad for name in names) for names in self._names]
        above = self._parts[trains.index(True) :] if any(trains) else []
        last = next((part for part in above if part is not self._root), self._root)
        for part in self._parts:
            if isinstance(part, FSDPModule):  # itself is there already, so that nothing is gathered
                part.set_modules_to_backward_prefetch([part] if part is last else [])


def _find_blocks(module: nn.Module, units: Iterable[LayerUnit]) -> dict[LayerUnit, nn.Module]:
    """The modules that are layer units by themselves and share no parameter with any other module."""
    uses: dict[int, int] = {}
    for _, p in module.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    found = {}
    for unit in units:
        if unit.name in unit.modules and len(unit.modules) == 1:
            block = module.get_submodule(unit.name)
            own = [id(p) for _, p in block.named_parameters(remove_duplicate=False)]
            if all(own.count(i) == uses[i] for i in own) and type(block).forward is not nn.Module.forward:
                found[unit] = block
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
