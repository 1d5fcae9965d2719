"""HiFT for a GAN under manual optimization: each optimizer rotates through the layers of its own network."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hift import HiFTCallback


def network(inputs: int, outputs: int) -> nn.Sequential:
    hidden = [nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2)) for _ in range(2)]
    return nn.Sequential(nn.Sequential(nn.Linear(inputs, 64), nn.LeakyReLU(0.2)), *hidden, nn.Linear(64, outputs))


class GAN(pl.LightningModule):
    """Learns to draw points on a circle from noise. Nothing here knows of HiFT."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = network(4, 2)
        self.discriminator = network(2, 1)

    def forward(self, count: int) -> torch.Tensor:
        return self.generator(torch.randn(count, 4, device=self.device))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        (points,) = batch
        for_generator, for_discriminator = self.optimizers()

        self.toggle_optimizer(for_discriminator)
        real, drawn = self.discriminator(points), self.discriminator(self(len(points)).detach())
        self._step(for_discriminator, _loss(real, True) + _loss(drawn, False), "discriminator_loss")
        self.untoggle_optimizer(for_discriminator)

        self.toggle_optimizer(for_generator)
        self._step(for_generator, _loss(self.discriminator(self(len(points))), True), "generator_loss")
        self.untoggle_optimizer(for_generator)

    def _step(self, optimizer: pl.core.optimizer.LightningOptimizer, loss: torch.Tensor, name: str) -> None:
        self.log(name, loss, prog_bar=True)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        # The discriminator has to keep ahead.
        rates = [(self.generator, 2e-3), (self.discriminator, 4e-3)]
        return [torch.optim.Adam(part.parameters(), lr=lr, betas=(0.5, 0.9)) for part, lr in rates]


def _loss(scores: torch.Tensor, real: bool) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))


def distance_from_circle(points: torch.Tensor) -> float:
    return float((points.norm(dim=1) - 1).abs().mean())


if __name__ == "__main__":
    pl.seed_everything(0)
    angles = torch.rand(4096) * 2 * torch.pi
    points = TensorDataset(torch.stack([angles.cos(), angles.sin()], dim=1))
    model = GAN()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=12,
        logger=False,
        enable_checkpointing=False,
        callbacks=[HiFTCallback()],
    )
    trainer.fit(model, DataLoader(points, batch_size=128, shuffle=True))
    with torch.no_grad():
        print(f"mean distance from the circle {distance_from_circle(model(1000)):.2f}")
