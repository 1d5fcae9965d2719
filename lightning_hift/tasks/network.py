"""Networks of the transformers library, from the hub, a folder, or a configuration alone."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

DType = Literal["float32", "bfloat16", "float16"]

# By auto class: its table in transformers, what its head is for, and the word that peft has for that.
_HEADS = {
    "AutoModelForSequenceClassification": ("SEQUENCE_CLASSIFICATION", "sequence classification", "SEQ_CLS"),
    "AutoModelForTokenClassification": ("TOKEN_CLASSIFICATION", "token classification", "TOKEN_CLS"),
    "AutoModelForQuestionAnswering": ("QUESTION_ANSWERING", "extractive question answering", "QUESTION_ANS"),
    "AutoModelForMaskedLM": ("MASKED_LM", "masked language modelling", None),
    "AutoModelForCausalLM": ("CAUSAL_LM", "causal language modelling", "CAUSAL_LM"),
    "AutoModelForSeq2SeqLM": ("SEQ_TO_SEQ_CAUSAL_LM", "sequence-to-sequence language modelling", "SEQ_2_SEQ_LM"),
}


@dataclass(frozen=True)
class NetworkSource:
    """Where a network comes from and how it computes.

    Args:
        model: Name on the Hugging Face hub, or a local folder.
        model_type: Instead of ``model``: an architecture by its name in transformers, such as ``"llama"``.
        model_config: Fields of the configuration that differ from those of ``model``, or from the defaults.
        random_weights: Take only the configuration of ``model``.
        dtype: Of the weights. Leave it at float32 for ``precision="bf16-true"``, whose masters are taken from them.
        attn_implementation: ``"sdpa"``, ``"flash_attention_2"``, ``"eager"``...; default: what transformers chooses.
        gradient_checkpointing: Recompute all blocks in the backward pass, non-reentrant.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: There is no ``model`` and no ``model_type``, or both.
    """

    model: str | None = None
    model_type: str | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)
    random_weights: bool = False
    dtype: DType = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.model_type is None):
            raise ValueError(
                f"Got model={self.model!r} and model_type={self.model_type!r}; give one of them: model is a name on the"
                " hub or a local folder, model_type an architecture that starts from random weights."
            )


def read_config(source: NetworkSource, auto_class: str | None, **fields: Any) -> Any:
    """The configuration of a network, a ``PretrainedConfig`` of transformers.

    Args:
        source: Where it comes from.
        auto_class: The head that is wanted, such as ``"AutoModelForCausalLM"``; ``None`` asks for none.
        fields: Set last, like ``id2label``.

    Raises:
        ValueError: transformers knows no such type, the type has no such head, or the configuration no such field.
        OSError: ``model`` is neither a folder nor cached, and the hub does not have it or cannot be reached.
    """
    from transformers import AutoConfig

    if source.model_type is not None:
        if auto_class is not None:
            _check_head(source.model_type, auto_class, f"model_type={source.model_type!r}")
        config = AutoConfig.for_model(source.model_type)
    else:
        try:
            config = AutoConfig.from_pretrained(source.model, revision=source.revision)
        except OSError as error:
            raise OSError(cannot_open(f"model={source.model!r}", str(source.model), error)) from error
        except ValueError as error:
            raise ValueError(f"Got model={source.model!r}, which transformers cannot read: {error}") from error
        if auto_class is not None and not hasattr(config, "auto_map"):  # a model that brings its own code
            _check_head(config.model_type, auto_class, f"model={source.model!r}")
    unknown = [key for key in source.model_config if not _is_field(key, config)]
    if unknown:  # transformers would keep it as an attribute that nothing reads
        raise ValueError(
            f"Got {unknown[0]!r} in model_config, which is no field of {type(config).__name__}."
            f" {_nearest(unknown[0], config.to_dict())}"
        )
    # A cache of keys and values serves generation; in training it only costs memory.
    changed = {"use_cache": False, **source.model_config, **fields}
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        # T5's own convention; its configurations on the hub say so, the defaults of its class do not.
        changed.setdefault("decoder_start_token_id", changed.get("pad_token_id", config.pad_token_id))
    try:
        if source.model_type is not None:
            return AutoConfig.for_model(source.model_type, **changed)
        return type(config).from_dict({**config.to_dict(), **changed})
    except Exception as error:  # transformers has classes of its own for what does not go together
        raise ValueError(
            f"Got model_config={dict(source.model_config)}, which {type(config).__name__} of transformers refuses:"
            f" {error.__cause__ or error} Change those values."
        ) from error


def is_encoder_decoder(source: NetworkSource) -> bool:
    """Whether the architecture encodes one text and decodes another.

    Raises:
        ValueError: See ``read_config``.
        OSError: See ``read_config``.
    """
    from transformers import CONFIG_MAPPING

    if source.model_type is not None and source.model_type not in CONFIG_MAPPING:
        return False  # to be told what is wrong with it by who asks for a head
    return bool(getattr(read_config(source, None), "is_encoder_decoder", False))


def build_network(source: NetworkSource, auto_class: str, **fields: Any) -> nn.Module:
    """A network with its weights; without memory for them, and without reading them, under ``torch.device("meta")``.

    Args:
        source: Where it comes from.
        auto_class: The head that is wanted, such as ``"AutoModelForCausalLM"``.
        fields: Fields of the configuration that the task sets, like ``id2label``.

    Raises:
        ValueError: See ``read_config``; or the weights of ``model`` do not fit its configuration.
        OSError: See ``read_config``.
    """
    import transformers

    config = read_config(source, auto_class, **fields)
    factory = getattr(transformers, auto_class)
    options: dict[str, Any] = {"dtype": getattr(torch, source.dtype)}
    if source.attn_implementation is not None:
        options["attn_implementation"] = source.attn_implementation
    network: nn.Module
    if source.model is None or source.random_weights or torch.get_default_device().type == "meta":
        network = factory.from_config(config, **options)
    else:
        network = _load(factory, source, config, options)
    if source.gradient_checkpointing:
        # Its newer name.
        renamed = getattr(network, "activation_checkpointing_enable", None)
        (renamed or network.gradient_checkpointing_enable)({"use_reentrant": False})  # type: ignore[operator]
    return network.train()  # loaded ones come in evaluation mode, in which Lightning would leave them


def position_embeddings(network: nn.Module) -> list[nn.Embedding]:
    """Learnt embeddings of positions. Those with a ``padding_idx`` count from the token behind it."""
    return [part for name, part in network.named_modules() if isinstance(part, nn.Embedding) and "position" in name]


def tell_padding(network: nn.Module, pad_token_id: int) -> None:
    """Put the padding of batches into the configuration, by which a classifier on a decoder finds where a text ends.

    Not before the network is built: its embedding would not learn that token, which may be the end of a sequence, too.
    """
    config = network.config.get_text_config()  # type: ignore[union-attr, operator]
    if not any(part.padding_idx is not None for part in position_embeddings(network)):
        config.pad_token_id = pad_token_id


def peft_task_type(auto_class: str) -> str | None:
    """peft's word for the task, by which it knows which head stays trainable."""
    return _HEADS[auto_class][2]


def cannot_open(got: str, name: str, error: Exception) -> str:
    """What to do about a name that is no folder, not cached and not to be had from the hub."""
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"Got {got}, which is no local folder with the files wanted, and the hub gave nothing: {first_line} Without a"
        f" network, download it where there is one (hf download {name} --local-dir FOLDER) and give the folder;"
        " model_type and model_config need no files at all."
    )


def _load(factory: Any, source: NetworkSource, config: Any, options: Mapping[str, Any]) -> nn.Module:
    try:
        network, report = factory.from_pretrained(
            source.model,
            config=config,
            revision=source.revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except OSError as error:
        raise OSError(cannot_open(f"model={source.model!r}", str(source.model), error)) from error
    prefix = network.base_model_prefix + "."
    misfits = {name: (tuple(saved), tuple(wanted)) for name, saved, wanted in report["mismatched_keys"]}
    wrong = [name for name in misfits if name.startswith(prefix)]
    if wrong:
        saved, wanted = misfits[wrong[0]]
        raise ValueError(
            f"Got model={source.model!r}, whose weights do not fit the configuration: {wrong[0]} has shape {saved}, the"
            f" configuration asks for {wanted}. Change model_config, or set random_weights to train from scratch."
        )
    fresh = sorted(name for name in report["missing_keys"] if name.startswith(prefix))
    if fresh:
        warnings.warn(
            f"{len(fresh)} weights below the head are not in {source.model!r} and start random: {_some(fresh)}.",
            stacklevel=2,
        )
    if misfits:
        warnings.warn(
            f"The head of {source.model!r} has another shape and starts random: {_some(misfits)}.", stacklevel=2
        )
    loaded: nn.Module = network
    return loaded


def _check_head(model_type: str, auto_class: str, got: str) -> None:
    from transformers.models.auto import modeling_auto

    def types_with(head: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{_HEADS[head][0]}_MAPPING_NAMES")
        return found

    if model_type in types_with(auto_class):
        return
    others = [_HEADS[head][1] for head in _HEADS if model_type in types_with(head)]
    advice = f"It has one for {', '.join(others)}." if others else _nearest(model_type, types_with(auto_class))
    raise ValueError(
        f"Got {got}, which is no model for {_HEADS[auto_class][1]} of the installed transformers. {advice} All types:"
        f" transformers.models.auto.modeling_auto.MODEL_FOR_{_HEADS[auto_class][0]}_MAPPING_NAMES."
    )


def _is_field(key: str, config: Any) -> bool:
    if hasattr(config, key) or hasattr(config, f"_{key}"):
        return True
    # Some are only in configurations of the hub, and read from there with a default of the network's code.
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    code = inspect.getsource(importlib.import_module(name)) if find_spec(name) is not None else ""
    return re.search(rf"""config(\.|, ["']){re.escape(key)}\b""", code) is not None


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, matches))}?" if matches else "Check its spelling."


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
