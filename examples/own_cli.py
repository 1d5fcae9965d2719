"""A LightningCLI script of your own, which does not mention HiFT: own_cli.yaml brings it in by two entries.

python own_cli.py fit --config own_cli.yaml
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Sorter(pl.LightningModule):
    """A transformer that marks the largest of eight numbers.

    Args:
        width: Of each layer.
        depth: Number of layers.
    """

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(numbers[..., None])))[..., 0]

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean(), prog_bar=True)


class Numbers(pl.LightningDataModule):
    """Rows of eight random numbers, and where the largest is.

    Args:
        batch_size: Rows per batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self._rows(2048, seed=0), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self._rows(512, seed=1), batch_size=512)

    def _rows(self, count: int, seed: int) -> TensorDataset:
        numbers = torch.rand(count, 8, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(numbers, numbers.argmax(-1))


if __name__ == "__main__":
    cli = LightningCLI(Sorter, Numbers, save_config_callback=None)
    print(f"validation accuracy {cli.trainer.callback_metrics['val_accuracy']:.3f}")
