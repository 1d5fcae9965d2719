"""LightningModules."""

from lightning_hift.tasks.causal_lm import CausalLM
from lightning_hift.tasks.generation import ConditionalGeneration
from lightning_hift.tasks.prompt_classification import PromptClassification
from lightning_hift.tasks.question_answering import QuestionAnswering
from lightning_hift.tasks.sequence_classification import SequenceClassification
from lightning_hift.tasks.token_classification import TokenClassification
from lightning_hift.tasks.transformer import TransformerModule

__all__ = [
    "CausalLM",
    "ConditionalGeneration",
    "PromptClassification",
    "QuestionAnswering",
    "SequenceClassification",
    "TokenClassification",
    "TransformerModule",
]
