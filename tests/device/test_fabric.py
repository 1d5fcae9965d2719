"""HiFT in a loop of Fabric: on the device as on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric import Fabric

from lightning_hift import HiFTFabricStrategy
from tests.matrices import crossed
from tests.models import Net, adamw, assert_same_weights, next_token_loss, published, tokens

pytestmark = pytest.mark.device


def begin(device, precision, apart=False, **options):
    if device != "cpu":
        from tests.device.softgpu import SoftGpuAccelerator

        device = SoftGpuAccelerator()
    fabric = Fabric(
        accelerator=device, devices=1, precision=precision, strategy=HiFTFabricStrategy(**published(options))
    )
    with fabric.init_module():
        torch.manual_seed(0)
        model = Net()
    if apart:
        model = fabric.setup(model)
        return fabric, model, fabric.setup_optimizers(adamw(model.parameters()))
    return fabric, *fabric.setup(model, adamw(model.parameters()))


def train(fabric, model, optimizer, batches):
    for batch in batches:
        for half in batch.chunk(2):
            fabric.backward(next_token_loss(model, fabric.to_device(half)))
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()


OPTIONS = {"host": {}, "resident": {"offload": "none"}, "slices": {"max_group_numel": 100}}


@pytest.mark.parametrize(("name", "precision", "apart"), crossed(OPTIONS, ["32-true", "bf16-true"], [False, True]))
def test_on_the_device_as_on_the_cpu(name, precision, apart, tmp_path):
    options, results = OPTIONS[name], []
    for device in ("cpu", "softgpu"):
        fabric, model, optimizer = begin(device, precision, apart, **options)
        assert {p.device.type for p in model.parameters()} == {device}
        train(fabric, model, optimizer, tokens(8))
        fabric.save(tmp_path / "c.ckpt", {"model": model, "optimizer": optimizer})
        train(fabric, model, optimizer, tokens(7, seed=2))
        results.append(model.module.cpu())
        resumed, other, its = begin(device, precision, apart, **options)
        resumed.load(tmp_path / "c.ckpt", {"model": other, "optimizer": its})
        train(resumed, other, its, tokens(7, seed=2))
        results.append(other.module.cpu())
    for result in results[1:]:
        assert_same_weights(results[0], result)
