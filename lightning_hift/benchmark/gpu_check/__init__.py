"""One command that tells on a GPU whether the product is right, and how fast it is.

``python -m lightning_hift.benchmark.gpu_check run`` measures within a time budget and writes one JSON file per stage;
``... report FOLDER`` makes tables and pictures of them, anywhere. Models are built from their configuration with random
weights, so there is nothing to download. The most important stage comes first, as a run may be cut short at any time:

1. ``correctness``: weights and state are the same, bit for bit, wherever the state lives, and after a resume.
2. ``copies``: bandwidth of page-locked memory. It takes seconds, and without it no waiting time can be judged.
3. ``llama-2-7b``: memory and speed of HiFT, host memory and page-locking, a profile, and full fine-tuning beside it.
   The profile is taken here because the engine is there already: to page-lock its arenas again takes long.
4. ``llama-3-8b``: the same without a profile, for one batch shape.
"""
