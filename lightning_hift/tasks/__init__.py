"""LightningModules."""

from lightning_hift.tasks.causal_lm import CausalLM
from lightning_hift.tasks.generation import ConditionalGeneration
from lightning_hift.tasks.sequence_classification import SequenceClassification
from lightning_hift.tasks.transformer import TransformerModule

__all__ = ["CausalLM", "ConditionalGeneration", "SequenceClassification", "TransformerModule"]
