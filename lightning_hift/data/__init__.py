"""LightningDataModules."""

from lightning_hift.data.classification import ClassificationDataModule
from lightning_hift.data.generation import GenerationDataModule
from lightning_hift.data.instructions import InstructionDataModule
from lightning_hift.data.pretraining import PretrainingDataModule
from lightning_hift.data.python_source import PythonSourceDataModule, order0_bits_per_byte
from lightning_hift.data.tables import FileFormat
from lightning_hift.data.text import TextDataModule

__all__ = [
    "ClassificationDataModule",
    "FileFormat",
    "GenerationDataModule",
    "InstructionDataModule",
    "PretrainingDataModule",
    "PythonSourceDataModule",
    "TextDataModule",
    "order0_bits_per_byte",
]
