"""HiFT for a LightningModule that knows nothing of it: one more callback in the Trainer."""

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_hift import HiFTCallback


class ConvNet(pl.LightningModule):
    """An ordinary image classifier; the images are random, with a bright square whose place is the class."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        )
        self.classifier = nn.Linear(32 * 4 * 4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).flatten(1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=5e-3, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def images(count: int, seed: int) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = torch.rand(count, 1, 16, 16, generator=generator), torch.arange(count) % 4
    for image, label in zip(pixels, labels.tolist(), strict=True):
        row, column = 8 * (label // 2), 8 * (label % 2)
        image[:, row : row + 6, column : column + 6] += 0.5
    return torch.utils.data.TensorDataset(pixels, labels)


if __name__ == "__main__":
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        callbacks=[HiFTCallback()],
    )
    trainer.fit(
        ConvNet(),
        torch.utils.data.DataLoader(images(512, seed=0), batch_size=32, shuffle=True),
        torch.utils.data.DataLoader(images(128, seed=1), batch_size=64),
    )
    print(f"validation accuracy {trainer.callback_metrics['val_accuracy']:.3f}")
