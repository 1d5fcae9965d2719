"""LightningModules."""

from lightning_hift.tasks.causal_lm import CausalLM

__all__ = ["CausalLM"]
