"""Texts written for other texts: meaning to text, text to SQL, translation, summaries."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.text import SacreBLEUScore
from typing_extensions import override

from lightning_hift.activations.chunked_loss import IGNORED_LABEL
from lightning_hift.data.tokenizer import load_tokenizer
from lightning_hift.offload.sharded_tensors import is_sharded
from lightning_hift.tasks.adapters import of_own_tokens
from lightning_hift.tasks.metric_precision import full_precision
from lightning_hift.tasks.network import is_encoder_decoder
from lightning_hift.tasks.text_metrics import ExactMatch, Rouge
from lightning_hift.tasks.transformer import TransformerModule

_NOT_FOR_THE_NETWORK = ("prompts", "sources", "references")
_MAX_NEW_TOKENS = 128
_VALIDATIONS_KEY = "num_validations"


class ConditionalGeneration(TransformerModule):
    """Trains ``AutoModelForCausalLM`` or ``AutoModelForSeq2SeqLM`` to write a target for a source.

    A batch is a mapping of ``input_ids``, ``attention_mask`` and ``labels``, shape (batch, length); labels are -100
    where there is nothing to learn, as in the source. In evaluation it may also hold ``prompts``, a mapping of
    ``input_ids`` and ``attention_mask`` to generate from (padded on the left for a network that only decodes), and
    ``references``, a list of texts for each; to predict, ``prompts`` and perhaps ``sources``. ``GenerationDataModule``
    makes such batches.

    Logs ``val_loss`` (nats per token of the target), and of generated texts ``val_bleu`` (SacreBLEU), ``val_rouge1``,
    ``val_rouge2``, ``val_rougeL`` and ``val_exact_match``, all from 0 to 1; with ``test_`` in a test.

    Args:
        encoder_decoder: Use the head of an encoder-decoder (``True``) or of a decoder (``False``); default: what the
            configuration of the network says.
        generation: How to generate, as in transformers' ``GenerationConfig``: ``max_new_tokens`` (default 128),
            ``num_beams``, ``do_sample`` (default ``False``) and so on.
        generate_every: Generate in each so many-th validation of a run, resumed or not; 0: only in tests. A checkpoint
            that is chosen by a score needs 1.
        max_generated: Generate for so many prompts per evaluation and process at most; default: all.
        tokenizer: Name on the hub or local folder, to read what was generated; default: that of the data module, or of
            ``model``.
        kwargs: See ``TransformerModule``.

    Raises:
        ValueError: See ``TransformerModule``; ``generation`` holds an unknown option, or a number is out of range.
    """

    auto_class = "AutoModelForCausalLM"

    def __init__(
        self,
        *,
        encoder_decoder: bool | None = None,
        generation: dict[str, Any] | None = None,
        generate_every: int = 1,
        max_generated: int | None = None,
        tokenizer: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if generate_every < 0:
            raise ValueError(f"Got generate_every={generate_every}; it must be 0 (only in tests) or more.")
        if max_generated is not None and max_generated < 1:
            raise ValueError(f"Got max_generated={max_generated}; it must be at least 1. For none: generate_every=0.")
        self.generation = dict(generation or {})
        _check_options(self.generation)
        self.encoder_decoder = encoder_decoder
        self.generate_every = generate_every
        self.max_generated = max_generated
        self.tokenizer_name = tokenizer
        self._num_validations = 0  # of this run, with the one that is going on
        self._num_generated = 0  # in this evaluation

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an answer; a data module keeps room for them."""
        return int(self.generation.get("max_new_tokens", _MAX_NEW_TOKENS))

    @cached_property
    def has_encoder(self) -> bool:
        """Whether the network encodes the source apart from the target."""
        return is_encoder_decoder(self.source) if self.encoder_decoder is None else self.encoder_decoder

    @property
    @override
    def head(self) -> str:
        return "AutoModelForSeq2SeqLM" if self.has_encoder else self.auto_class

    @cached_property
    def tokenizer(self) -> Any:
        """Makes texts of tokens.

        Raises:
            ValueError: None was named, and there is no data module and no ``model`` to take it from.
        """
        found = self.of_data("tokenizer")
        if found is not None and self.tokenizer_name is None:
            return found
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name)
        if self.source.model is None:
            raise ValueError(
                "Got no tokenizer to make texts of tokens, and no data module or model to take it from. Name one:"
                " tokenizer is a name on the hub or a local folder."
            )
        return load_tokenizer(self.source.model, self.source.revision)

    @override
    def config_fields(self) -> dict[str, Any]:
        if not self.has_encoder or getattr(self.config, "decoder_start_token_id", None) is not None:
            return {}
        padding = getattr(self.config, "pad_token_id", None)
        return {"decoder_start_token_id": self.tokenizer.pad_token_id if padding is None else padding}

    @override
    def make_metrics(self) -> dict[str, Metric]:
        return {"bleu": SacreBLEUScore(), "rouge": Rouge(), "exact_match": ExactMatch()}

    @override
    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean loss in nats per token of the target, a scalar."""
        loss: Tensor = self._output(batch).loss
        return loss

    @override
    def evaluate(self, batch: Mapping[str, Any], stage: Literal["val", "test"]) -> None:
        labels = batch["labels"] if self.has_encoder else batch["labels"][:, 1:]
        num_tokens = int((labels != IGNORED_LABEL).sum())
        if num_tokens:
            loss = self._nats_per_token(self._output(batch), batch["labels"])
            self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=num_tokens, sync_dist=True)
        if not self._generates(stage) or "prompts" not in batch:
            return
        left = None if self.max_generated is None else max(0, self.max_generated - self._num_generated)
        prompts = {name: rows[:left] for name, rows in batch["prompts"].items()}
        if len(prompts["input_ids"]):
            texts = self.generate(prompts)
            self._num_generated += len(texts)
            self.metrics[stage].update(texts, batch["references"][:left])  # type: ignore[operator]

    @torch.no_grad()
    def generate(self, prompts: Mapping[str, Tensor]) -> list[str]:
        """What the network writes, without special tokens.

        Args:
            prompts: ``input_ids`` and ``attention_mask``, shape (batch, length); padded on the left for a network that
                only decodes.
        """
        assert self.network is not None, "configure_model builds the network; the Trainer calls it"
        options = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "use_cache": True,  # which the configuration switches off for training
            # Where processes gather weights from each other, all go on until the longest text is written.
            "synced_gpus": any(is_sharded(p) for p in self.network.parameters()),
            **self.generation,
        }
        tokens = self.network.generate(**prompts, **options)  # type: ignore[operator]
        if not self.has_encoder:
            tokens = tokens[:, prompts["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, str]]:
        """One record per prompt: ``source`` and ``prediction``."""
        prompts = batch.get("prompts") or {name: batch[name] for name in ("input_ids", "attention_mask")}
        sources = batch.get("sources") or self.tokenizer.batch_decode(prompts["input_ids"], skip_special_tokens=True)
        return [
            {"source": source, "prediction": text} for source, text in zip(sources, self.generate(prompts), strict=True)
        ]

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._num_generated = 0
        self._num_validations += not self.trainer.sanity_checking

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self._num_generated = 0

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_VALIDATIONS_KEY] = self._num_validations

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._num_validations = checkpoint.get(_VALIDATIONS_KEY, 0)

    def _output(self, batch: Mapping[str, Any]) -> Any:
        return self({k: v for k, v in batch.items() if k not in _NOT_FOR_THE_NETWORK})

    def _nats_per_token(self, output: Any, labels: Tensor) -> Tensor:
        """Mean loss per token of the target, in 32 bits; that of an encoder-decoder has the dtype of its weights."""
        if not self.has_encoder:
            return full_precision(output.loss)
        logits = full_precision(of_own_tokens(output.logits, labels))
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)

    def _generates(self, stage: str) -> bool:
        if stage == "test" or self.trainer.state.fn != TrainerFn.FITTING:
            return True
        # Before training, it is tried in any case, so that nothing fails only after hours.
        return self.generate_every > 0 and (
            self.trainer.sanity_checking or self._num_validations % self.generate_every == 0
        )


def _check_options(options: Mapping[str, Any]) -> None:
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    unknown = [name for name in options if name not in known]
    if unknown:
        matches = difflib.get_close_matches(unknown[0], list(known))
        advice = f"Did you mean {' or '.join(map(repr, matches))}?" if matches else "Check its spelling."
        raise ValueError(f"Got {unknown[0]!r} in generation, which is no option of GenerationConfig. {advice}")
    if options.get("num_return_sequences", 1) != 1:
        raise ValueError(
            f"Got num_return_sequences={options['num_return_sequences']} in generation; one text is compared and"
            " returned for each source. Leave it out."
        )
    most = options.get("max_new_tokens", _MAX_NEW_TOKENS)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"Got max_new_tokens={most!r} in generation; it must be a whole number of at least 1.")
