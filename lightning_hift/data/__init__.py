"""LightningDataModules."""

from lightning_hift.data.classification import ClassificationDataModule
from lightning_hift.data.generation import GenerationDataModule
from lightning_hift.data.instructions import InstructionDataModule
from lightning_hift.data.pretraining import PretrainingDataModule
from lightning_hift.data.prompt_classification import PromptDataModule
from lightning_hift.data.python_source import PythonSourceDataModule, order0_bits_per_byte
from lightning_hift.data.question_answering import QuestionAnsweringDataModule
from lightning_hift.data.tables import FileFormat
from lightning_hift.data.text import TextDataModule
from lightning_hift.data.token_classification import TokenClassificationDataModule

__all__ = [
    "ClassificationDataModule",
    "FileFormat",
    "GenerationDataModule",
    "InstructionDataModule",
    "PretrainingDataModule",
    "PromptDataModule",
    "PythonSourceDataModule",
    "QuestionAnsweringDataModule",
    "TextDataModule",
    "TokenClassificationDataModule",
    "order0_bits_per_byte",
]
