"""HiFT in the training loops of Hugging Face: of transformers, and what is built on it."""
