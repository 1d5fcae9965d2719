"""PythonSourceDataModule: split by file, deterministic, resumable."""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_hift.data import PythonSourceDataModule, order0_bits_per_byte
from lightning_hift.data.python_source import ShuffledBatches

LENGTH, BATCH = 8, 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty small files, some of which are to be skipped."""
    root = tmp_path / "sources"
    for number in range(40):
        path = root / ("pkg" if number % 2 else ".") / f"file_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"value_{number} = {number}\n")
    for skipped in ("tests", "site-packages"):
        (root / skipped).mkdir()
        (root / skipped / "other.py").write_text("raise SystemExit\n")
    (root / "notes.txt").write_text("not Python")
    return root


def data_of(folder: Path, **options: object) -> PythonSourceDataModule:
    defaults = {"sequence_length": LENGTH, "batch_size": BATCH, "folder": str(folder), "val_fraction": 0.3}
    return PythonSourceDataModule(**{**defaults, **options})  # type: ignore[arg-type]


def test_files_are_in_one_part_only(folder: Path) -> None:
    train, val = data_of(folder).split_files()
    assert not set(train) & set(val)
    assert len(train) + len(val) == 40
    assert 4 <= len(val) <= 20


def test_split_is_the_same_in_another_place_and_another_with_another_seed(folder: Path) -> None:
    def names(root: Path, seed: int) -> list[str]:
        return [path.name for path in data_of(root, seed=seed).split_files()[1]]

    before = names(folder, 0)
    moved = folder.rename(folder.with_name("moved"))
    assert names(moved, 0) == before
    assert names(moved, 1) != before


def test_texts_hold_the_files_and_respect_the_limits(folder: Path) -> None:
    data = data_of(folder)
    train, _ = data.split_files()
    assert bytes(data.train_bytes.tolist()) == b"".join(path.read_bytes() + b"\0" for path in train)
    small = data_of(folder, max_train_bytes=100, max_val_bytes=30)
    assert (len(small.train_bytes), len(small.val_bytes)) == (100, 30)
    assert torch.equal(small.train_bytes, data.train_bytes[:100])


def test_default_is_the_standard_library() -> None:
    data = PythonSourceDataModule(max_train_bytes=200_000, max_val_bytes=50_000)
    train, val = data.split_files()
    names = {path.relative_to(data.folder).as_posix() for path in (*train, *val)}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert 4 < order0_bits_per_byte(data.train_bytes, data.val_bytes) < 5.5


def test_batches_are_token_ids(folder: Path) -> None:
    data = data_of(folder)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batch = next(iter(loader))["input_ids"]
        assert batch.shape == (BATCH, LENGTH)
        assert batch.dtype == torch.int64
        assert 0 <= int(batch.min()) <= int(batch.max()) < 256


def sequences(count: int = 11) -> Tensor:
    return torch.arange(count, dtype=torch.uint8)[:, None].expand(count, LENGTH)


def numbers(batches: object) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in batches]  # type: ignore[attr-defined]


def test_a_pass_shows_each_sequence_once_in_an_order_of_its_own() -> None:
    loader = ShuffledBatches(sequences(10), BATCH, seed=0)
    passes = [[n for batch in numbers(loader) for n in batch] for _ in range(3)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert numbers(ShuffledBatches(sequences(10), BATCH, seed=0)) == numbers(ShuffledBatches(sequences(10), BATCH, 0))
    assert numbers(ShuffledBatches(sequences(10), BATCH, seed=0)) != numbers(ShuffledBatches(sequences(10), BATCH, 1))


def test_val_batches_keep_the_last_sequences_and_repeat(folder: Path) -> None:
    loader = data_of(folder, max_val_bytes=LENGTH * 5).val_dataloader()
    first, second = ([batch["input_ids"] for batch in loader] for _ in range(2))
    assert [len(batch) for batch in first] == [2, 2, 1]
    assert len(loader) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_a_loaded_state_goes_on_at_the_next_batch(stop: int) -> None:
    through = ShuffledBatches(sequences(), BATCH, seed=3)
    expected = [batch for _ in range(3) for batch in numbers(through)]

    stopped = ShuffledBatches(sequences(), BATCH, seed=3)
    seen: list[list[int]] = []
    while len(seen) < stop:
        seen += numbers([next(iter(stopped))])
    resumed = ShuffledBatches(sequences(), BATCH, seed=3)
    resumed.load_state_dict(stopped.state_dict())
    assert seen + numbers(resumed) == expected[: stop + len(through)]


def test_a_state_of_other_data_is_refused() -> None:
    state = ShuffledBatches(sequences(), BATCH, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"other training data, .*'seed': 0.*'seed': 1"):
        ShuffledBatches(sequences(), BATCH, seed=1).load_state_dict(state)


class Recorder(pl.LightningModule):
    """Notes the batches that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches: list[list[int]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.batches.append(batch["input_ids"].flatten().tolist())
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("batch_size", float(len(batch["input_ids"])))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, steps: int, ckpt_path: str | None = None, **options: object) -> tuple[pl.Trainer, Recorder]:
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(module, datamodule=data_of(folder, max_train_bytes=LENGTH * BATCH * 5), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize(("stop", "limit"), [(2, None), (5, None), (8, None), (2, 3), (3, 3), (7, 3)])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    folder: Path, tmp_path: Path, stop: int, limit: int | None
) -> None:
    _, through = fit(folder, 13, limit_train_batches=limit)
    trainer, before = fit(folder, stop, limit_train_batches=limit)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    _, after = fit(folder, 13, ckpt_path=str(tmp_path / "stopped.ckpt"), limit_train_batches=limit)
    assert before.batches + after.batches == through.batches


def test_order0_of_known_frequencies() -> None:
    train = torch.tensor([65] * 744 + [66] * 0, dtype=torch.uint8)  # 745 of 1000 after smoothing
    assert order0_bits_per_byte(train, torch.tensor([65], dtype=torch.uint8)) == pytest.approx(-math.log2(0.745))
    assert order0_bits_per_byte(train, torch.tensor([66], dtype=torch.uint8)) == pytest.approx(-math.log2(0.001))


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.py file .* Name a folder with Python sources"):
        data_of(tmp_path).setup("fit")


def test_too_little_text_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"bytes of train text .* one batch needs 80,000.* smaller sequence_length"):
        data_of(folder, sequence_length=40_000).setup("fit")
    with pytest.raises(ValueError, match="Got 3 bytes of val text"):
        data_of(folder, max_val_bytes=3).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "Got sequence_length=1; it must be at least 2"),
        ({"batch_size": 0}, "Got batch_size=0; it must be at least 1"),
        ({"val_fraction": 1.0}, "Got val_fraction=1.0; it must lie between 0 and 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PythonSourceDataModule(**options)  # type: ignore[arg-type]
