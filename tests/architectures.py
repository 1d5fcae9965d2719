"""Tiny models of many architectures, built offline on the meta device, with the layer units that an expert expects."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning
import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class Architecture:
    """A model and what to expect of it.

    Args:
        units: Expected names of the units; ``"h.*3"`` stands for the three blocks ``h.0``, ``h.1``, ``h.2``.
        first: Parameters that belong to the first unit.
        last: Parameters that belong to the last unit.
        tied: Names of the weights that are the same tensor as one in the unit ``tied_to``.
    """

    name: str
    build: Callable[[], nn.Module]
    units: tuple[str, ...]
    first: tuple[str, ...]
    last: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    tied_to: str = "embedding"

    @property
    def unit_names(self) -> list[str]:
        """Names of the units with the runs of blocks spelled out."""
        names: list[str] = []
        for unit in self.units:
            repeated = re.fullmatch(r"(.*)\.\*(\d+)", unit)
            names += [f"{repeated[1]}.{i}" for i in range(int(repeated[2]))] if repeated else [unit]
        return names

    @property
    def block_names(self) -> list[str]:
        """Paths of the blocks in depth order."""
        return [name for name in self.unit_names if re.search(r"\.\d+$", name)]


def meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module without memory."""
    with torch.device("meta"):
        return build()


def hugging_face(model: str, config: str, **changes: Any) -> Callable[[], nn.Module]:
    """A builder of a tiny transformers model on the meta device."""

    def build() -> nn.Module:
        return meta(lambda: getattr(transformers, model)(getattr(transformers, config)(**changes)))

    return build


TINY = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
_ROPE = {**TINY, "num_key_value_heads": 1, "head_dim": 8}
_GPT2 = {"vocab_size": 97, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
_NEO = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 32,
}
_OPT = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
}
_OPT_350M = {**_OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False}
_SEQ2SEQ = {
    "vocab_size": 97,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "pad_token_id": 0,
}
_T5 = {"vocab_size": 97, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
_DEBERTA_V2_XL = {"conv_kernel_size": 3, "relative_attention": True, "norm_rel_ebd": "layer_norm"}
_DISTILBERT = {"vocab_size": 97, "dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 2}
_VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP = {
    "text_config": {**_TOWER, "vocab_size": 97},
    "vision_config": {**_TOWER, "image_size": 8, "patch_size": 4},
    "projection_dim": 8,
}
_LLAVA = {
    "text_config": {**_ROPE, "model_type": "llama"},
    "vision_config": {**_TOWER, "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"},
}
_SPEECH = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


def _decoder(
    name: str,
    *norm: str,
    path: str = "model",
    layers: str = "layers.*3",
    embed: str = "embed_tokens",
    tied: bool = False,
) -> Callable[..., Architecture]:
    """A causal language model: embedding, blocks, final norm, head."""

    def make(model: str, config: str, head: str = "lm_head", **changes: Any) -> Architecture:
        return Architecture(
            name,
            hugging_face(model, config, **changes),
            ("embedding", f"{path}.{layers}", "head"),
            (f"{path}.{embed}.weight",),
            (*(f"{path}.{n}.weight" for n in norm), *(() if tied else (f"{head}.weight",))),
            (f"{head}.weight",) if tied else (),
        )

    return make


def _encoder(name: str, model: str, config: str, path: str, blocks: str, *last: str, **changes: Any) -> Architecture:
    """An encoder with its head."""
    embedding = f"{path}.embeddings.word_embeddings.weight"
    tied = {
        "BertForMaskedLM": ("cls.predictions.decoder.weight",),
        "BertForPreTraining": ("cls.predictions.decoder.weight",),
        "RobertaForMaskedLM": ("lm_head.decoder.weight",),
    }
    return Architecture(
        name,
        hugging_face(model, config, **changes),
        ("embedding", f"{path}.{blocks}", "head"),
        (embedding,),
        last,
        tied.get(model, ()),
    )


_GPT_STYLE: dict[str, Any] = {"path": "transformer", "layers": "h.*3", "embed": "wte"}

DECODERS = [
    _decoder("llama", "norm")("LlamaForCausalLM", "LlamaConfig", **_ROPE),
    _decoder("llama-classifier", "norm")("LlamaForSequenceClassification", "LlamaConfig", "score", **_ROPE),
    _decoder("mistral", "norm")("MistralForCausalLM", "MistralConfig", **_ROPE),
    _decoder("mixtral", "norm")("MixtralForCausalLM", "MixtralConfig", num_local_experts=3, **_ROPE),
    _decoder("qwen3", "norm")("Qwen3ForCausalLM", "Qwen3Config", **_ROPE),
    _decoder("gemma", "norm", tied=True)("GemmaForCausalLM", "GemmaConfig", **_ROPE),
    _decoder("phi", "final_layernorm")("PhiForCausalLM", "PhiConfig", **TINY),
    _decoder("gpt2", "ln_f", tied=True, **_GPT_STYLE)("GPT2LMHeadModel", "GPT2Config", **_GPT2),
    _decoder("gpt2-classifier", "ln_f", **_GPT_STYLE)("GPT2ForSequenceClassification", "GPT2Config", "score", **_GPT2),
    _decoder("gpt2-two-heads", "ln_f", **_GPT_STYLE)(
        "GPT2DoubleHeadsModel", "GPT2Config", "multiple_choice_head.summary", **_GPT2, num_labels=1
    ),
    _decoder("gpt-neo", "ln_f", tied=True, **{**_GPT_STYLE, "layers": "h.*2"})(
        "GPTNeoForCausalLM", "GPTNeoConfig", **_NEO
    ),
    _decoder("gpt-neox", "final_layer_norm", path="gpt_neox", embed="embed_in")(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", **TINY
    ),
    _decoder("opt", "final_layer_norm", path="model.decoder", tied=True)("OPTForCausalLM", "OPTConfig", **_OPT),
    _decoder("opt-classifier", "final_layer_norm", path="model.decoder")(
        "OPTForSequenceClassification", "OPTConfig", "score", **_OPT
    ),
    _decoder("opt-350m", "project_out", path="model.decoder", tied=True)("OPTForCausalLM", "OPTConfig", **_OPT_350M),
    _decoder("opt-350m-classifier", "project_out", path="model.decoder")(
        "OPTForSequenceClassification", "OPTConfig", "score", **_OPT_350M
    ),
    _decoder("bloom", "ln_f", tied=True, **{**_GPT_STYLE, "embed": "word_embeddings"})(
        "BloomForCausalLM", "BloomConfig", vocab_size=97, hidden_size=16, n_layer=3, n_head=2
    ),
    _decoder("falcon", "ln_f", tied=True, **{**_GPT_STYLE, "embed": "word_embeddings"})(
        "FalconForCausalLM", "FalconConfig", **TINY
    ),
    _decoder("mamba", "norm_f", path="backbone", embed="embeddings", tied=True)(
        "MambaForCausalLM", "MambaConfig", vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=3
    ),
    _decoder("rwkv", "ln_out", path="rwkv", layers="blocks.*3", embed="embeddings")(
        "RwkvForCausalLM", "RwkvConfig", "head", vocab_size=97, hidden_size=16, num_hidden_layers=3
    ),
]

ENCODERS = [
    _encoder(
        "bert", "BertForSequenceClassification", "BertConfig", "bert", "encoder.layer.*3",
        "bert.pooler.dense.weight", "classifier.weight", **TINY,
    ),
    _encoder(
        "bert-masked", "BertForMaskedLM", "BertConfig", "bert", "encoder.layer.*3",
        "cls.predictions.transform.dense.weight", **TINY,
    ),
    _encoder(
        "bert-two-heads", "BertForPreTraining", "BertConfig", "bert", "encoder.layer.*3",
        "cls.predictions.transform.dense.weight", "cls.seq_relationship.weight", **TINY,
    ),
    _encoder(
        "roberta", "RobertaForSequenceClassification", "RobertaConfig", "roberta", "encoder.layer.*3",
        "classifier.dense.weight", "classifier.out_proj.weight", **TINY,
    ),
    _encoder(
        "roberta-masked", "RobertaForMaskedLM", "RobertaConfig", "roberta", "encoder.layer.*3",
        "lm_head.dense.weight", "lm_head.layer_norm.weight", **TINY,
    ),
    _encoder(
        "deberta-v2", "DebertaV2ForSequenceClassification", "DebertaV2Config", "deberta", "encoder.layer.*3",
        "pooler.dense.weight", "classifier.weight", **TINY,
    ),
    _encoder(
        "deberta-v2-xlarge", "DebertaV2ForSequenceClassification", "DebertaV2Config", "deberta", "encoder.layer.*3",
        "pooler.dense.weight", "classifier.weight", **TINY, **_DEBERTA_V2_XL,
    ),
    _encoder(
        "distilbert", "DistilBertForSequenceClassification", "DistilBertConfig", "distilbert", "transformer.layer.*3",
        "pre_classifier.weight", "classifier.weight", **_DISTILBERT,
    ),
    _encoder(
        "electra", "ElectraForSequenceClassification", "ElectraConfig", "electra", "encoder.layer.*3",
        "classifier.dense.weight", "classifier.out_proj.weight", **TINY, embedding_size=8,
    ),
    _encoder(
        "electra-discriminator", "ElectraForPreTraining", "ElectraConfig", "electra", "encoder.layer.*3",
        "discriminator_predictions.dense.weight", **TINY, embedding_size=8,
    ),
    _encoder(
        "albert", "AlbertForSequenceClassification", "AlbertConfig", "albert", "encoder.albert_layer_groups.*1",
        "albert.pooler.weight", "classifier.weight", **TINY, embedding_size=8,
    ),
    _encoder(
        "xmod", "XmodForSequenceClassification", "XmodConfig", "roberta", "encoder.layer.*3",
        "classifier.dense.weight", **TINY, languages=("en_XX", "de_DE"),
    ),
]  # fmt: skip

TWO_TOWERS = [
    Architecture(
        "t5",
        hugging_face("T5ForConditionalGeneration", "T5Config", **_T5),
        ("embedding", "encoder.block.*2", "decoder.block.*2", "head"),
        ("shared.weight",),
        ("decoder.final_layer_norm.weight",),
        ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ),
    Architecture(
        "t5-classifier",
        hugging_face("T5ForSequenceClassification", "T5Config", **_T5),
        ("embedding", "transformer.encoder.block.*2", "transformer.decoder.block.*2", "head"),
        ("transformer.shared.weight",),
        ("transformer.decoder.final_layer_norm.weight", "classification_head.out_proj.weight"),
    ),
    Architecture(
        "bart",  # its decoder ends without a norm, and the head is tied: there is nothing for a head unit to hold
        hugging_face("BartForConditionalGeneration", "BartConfig", **_SEQ2SEQ),
        ("embedding", "model.encoder.layers.*2", "model.decoder.embed_tokens", "model.decoder.layers.*2"),
        ("model.shared.weight", "model.encoder.layernorm_embedding.weight"),
        (),
        ("lm_head.weight",),
    ),
    Architecture(
        "bart-classifier",
        hugging_face("BartForSequenceClassification", "BartConfig", **_SEQ2SEQ),
        ("embedding", "model.encoder.layers.*2", "model.decoder.embed_tokens", "model.decoder.layers.*2", "head"),
        ("model.shared.weight",),
        ("classification_head.dense.weight", "classification_head.out_proj.weight"),
    ),
    Architecture(
        "fsmt",
        hugging_face(
            "FSMTForConditionalGeneration", "FSMTConfig", langs=["en", "de"], src_vocab_size=97, tgt_vocab_size=89,
            **{k: v for k, v in _SEQ2SEQ.items() if k != "vocab_size"},
        ),
        ("embedding", "model.encoder.layers.*2", "model.decoder.embed_positions", "model.decoder.layers.*2", "head"),
        ("model.encoder.embed_tokens.weight",),
        ("model.decoder.output_projection.weight",),
    ),
    Architecture(
        "whisper",
        hugging_face("WhisperForConditionalGeneration", "WhisperConfig", **_SEQ2SEQ),
        ("embedding", "model.encoder.layers.*2", "model.decoder.embed_tokens", "model.decoder.layers.*2", "head"),
        ("model.encoder.conv1.weight", "model.encoder.conv2.weight"),
        ("model.decoder.layer_norm.weight",),
        ("proj_out.weight",),
        "model.decoder.embed_tokens",
    ),
    Architecture(
        "clip",
        hugging_face("CLIPModel", "CLIPConfig", **_CLIP),
        (
            "embedding", "vision_model.encoder.layers.*2", "vision_model.post_layernorm", "text_model.embeddings",
            "text_model.encoder.layers.*2", "head",
        ),
        ("vision_model.embeddings.patch_embedding.weight", "vision_model.pre_layrnorm.weight"),
        ("text_model.final_layer_norm.weight", "text_projection.weight", "logit_scale"),
    ),
    Architecture(
        "llava",
        hugging_face("LlavaForConditionalGeneration", "LlavaConfig", **_LLAVA),
        (
            "embedding", "model.vision_tower.encoder.layers.*2", "model.vision_tower.post_layernorm",
            "model.language_model.embed_tokens", "model.language_model.layers.*3", "head",
        ),
        ("model.vision_tower.embeddings.patch_embedding.weight",),
        ("model.language_model.norm.weight", "lm_head.weight"),
    ),
]  # fmt: skip

VISION_AND_AUDIO = [
    Architecture(
        "vit",
        hugging_face("ViTForImageClassification", "ViTConfig", **_VIT),
        ("embedding", "vit.layers.*3", "head"),
        ("vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection.weight"),
        ("vit.layernorm.weight", "classifier.weight"),
    ),
    Architecture(
        "clip-classifier",
        hugging_face("CLIPForImageClassification", "CLIPConfig", **_CLIP),
        ("embedding", "vision_model.encoder.layers.*2", "head"),
        ("vision_model.embeddings.patch_embedding.weight",),
        ("vision_model.post_layernorm.weight", "classifier.weight"),
    ),
    Architecture(
        "swin",
        hugging_face(
            "SwinForImageClassification", "SwinConfig", image_size=16, patch_size=2, embed_dim=8, depths=[2, 2],
            num_heads=[1, 2], window_size=2,
        ),
        (
            "embedding", "swin.encoder.layers.0.blocks.*2", "swin.encoder.layers.0.downsample",
            "swin.encoder.layers.1.blocks.*2", "head",
        ),
        ("swin.embeddings.patch_embeddings.projection.weight",),
        ("swin.layernorm.weight", "classifier.weight"),
    ),
    Architecture(
        "resnet",
        hugging_face(
            "ResNetForImageClassification", "ResNetConfig", embedding_size=4, hidden_sizes=[8, 16], depths=[2, 2]
        ),
        ("embedding", "resnet.encoder.stages.0.layers.*2", "resnet.encoder.stages.1.layers.*2", "head"),
        ("resnet.embedder.embedder.convolution.weight",),
        ("classifier.1.weight",),
    ),
    Architecture(
        "segformer",
        hugging_face(
            "SegformerForImageClassification", "SegformerConfig", num_encoder_blocks=2, depths=[2, 2],
            sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2],
        ),
        (
            "embedding", "segformer.stages.0.blocks.*2", "segformer.stages.1.patch_embeddings",
            "segformer.stages.1.blocks.*2", "head",
        ),
        ("segformer.stages.0.patch_embeddings.proj.weight",),
        ("segformer.stages.1.layer_norm.weight", "classifier.weight"),
    ),
    Architecture(
        "wav2vec2",
        hugging_face("Wav2Vec2ForCTC", "Wav2Vec2Config", **_SPEECH),
        ("embedding", "wav2vec2.encoder.layers.*3", "head"),
        ("wav2vec2.feature_extractor.conv_layers.0.conv.weight", "wav2vec2.feature_projection.projection.weight"),
        ("lm_head.weight",),
    ),
]  # fmt: skip

PRETRAINED_STYLE = [*DECODERS, *ENCODERS, *TWO_TOWERS, *VISION_AND_AUDIO]


# --- written by hand, as a user would -------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with a norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class NanoGPT(nn.Module):
    """All parts in one ``nn.ModuleDict``, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(97, 8),
                "wpe": nn.Embedding(32, 8),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList(Block() for _ in range(3)),
                "ln_f": nn.LayerNorm(8),
            }
        )
        self.lm_head = nn.Linear(8, 97, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.transformer.wte(tokens) + self.transformer.wpe(torch.arange(tokens.shape[1]))
        for block in self.transformer.h:
            x = block(self.transformer.drop(x))
        return self.lm_head(self.transformer.ln_f(x))


class Seq2Seq(nn.Module):
    """Around ``nn.Transformer``."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(8, 97)
        self.source, self.target = nn.Embedding(97, 8), nn.Embedding(97, 8)
        self.transformer = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.generator(self.transformer(self.source(source), self.target(target)))


class BlocksAsAttributes(nn.Module):
    """No container at all, registered in an order that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)
        self.layer3, self.layer2, self.layer1 = Block(), Block(), Block()
        self.embed = nn.Embedding(97, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layer3(self.layer2(self.layer1(self.embed(tokens))))))


class Wrapped(lightning.LightningModule):
    """A LightningModule around a transformers model with a head of its own, listed first."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(16, 3)
        self.backbone = hugging_face("BertModel", "BertConfig", **TINY)()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        hidden = self.backbone(**batch["inputs"]).last_hidden_state[:, 0]
        return nn.functional.cross_entropy(self.classifier(hidden), batch["labels"])


class DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.b(torch.relu(self.norm(self.a(x)))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList([DoubleConv(1, 4), DoubleConv(4, 8)])
        self.ups = nn.ModuleList([DoubleConv(24, 8), DoubleConv(12, 4)])
        self.bottleneck = DoubleConv(8, 16)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
        x = self.bottleneck(x)
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(torch.cat([x, skip], dim=1))
        return self.out(x)


class Down(nn.Module):
    """A block with a container inside."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.MaxPool2d(2), DoubleConv(inputs, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Up(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        self.body = DoubleConv(inputs, outputs)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.body(torch.cat([skip, self.up(x)], dim=1))


class UNetWithAttributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.down1, self.down2, self.down3 = Down(2, 4), Down(4, 8), Down(8, 16)
        self.up1, self.up2, self.up3 = Up(16, 8), Up(8, 4), Up(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1 = self.inside(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        return self.outside(self.up3(self.up2(self.up1(x4, x3), x2), x1))


class Tagger(nn.Module):
    """Embedding, LSTM, head: no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, bidirectional=True)
        self.attention = nn.MultiheadAttention(16, 2)
        self.tag = nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(self.embed(tokens))
        return self.tag(self.attention(x, x, x)[0])


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 16))
        self.encoder = nn.Sequential(nn.Linear(16, 8), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(8, 2), nn.Linear(8, 2)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(x)
        mean, deviation = self.mean(hidden), (self.log_variance(hidden) / 2).exp()
        return mean + deviation * torch.randn_like(deviation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encode(x))


class Siamese(nn.Module):
    """One tower, used twice and registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Embedding(97, 8), Block(), Block())
        self.right = self.left
        self.score = nn.Bilinear(8, 8, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.score(self.left(a).mean(1), self.right(b).mean(1))


class DictOfBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {"in": nn.Linear(4, 8), "a": Block(), "b": Block(), "c": Block(), "out": nn.Linear(8, 2)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts.values():
            x = part(x)
        return x


class ListOfParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(4, 4)) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = x @ weight
        return x * self.scale


class Actor(nn.Module):
    """A net with a bare parameter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(2))
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.net(x), self.log_std.exp())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))


def sine() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def cnn() -> nn.Module:
    def layer(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(layer(1, 4), layer(4, 8), nn.Flatten(), nn.Linear(8, 10))


def weight_norm_mlp() -> nn.Module:
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(3)]
    return nn.Sequential(*layers)


HANDWRITTEN = [
    Architecture("mlp", mlp, ("0", "2", "5"), ("0.weight",), ("5.weight",)),
    Architecture("cnn", cnn, ("0", "1", "3"), ("0.0.weight", "0.1.weight"), ("3.weight",)),
    Architecture("one linear", lambda: nn.Linear(3, 2), ("Linear",), ("weight", "bias"), ("weight",)),
    Architecture("weight norm", weight_norm_mlp, ("0", "1", "2"), ("0.bias",), ("2.bias",)),
    Architecture(
        "nanoGPT",
        NanoGPT,
        ("embedding", "transformer.h.*3", "head"),
        ("transformer.wte.weight", "transformer.wpe.weight"),
        ("transformer.ln_f.weight",),
        ("lm_head.weight",),
    ),
    Architecture(
        "nn.Transformer",
        Seq2Seq,
        ("embedding", "transformer.encoder.layers.*2", "transformer.decoder.layers.*2", "head"),
        ("source.weight", "target.weight"),
        ("transformer.decoder.norm.weight", "generator.weight"),
    ),
    Architecture(
        "blocks as attributes",
        BlocksAsAttributes,
        ("embedding", "layer1", "layer2", "layer3", "head"),
        ("embed.weight",),
        ("norm.weight", "head.weight"),
    ),
    Architecture(
        "LightningModule",
        Wrapped,
        ("embedding", "backbone.encoder.layer.*3", "head"),
        ("backbone.embeddings.word_embeddings.weight",),
        ("backbone.pooler.dense.weight", "classifier.weight"),
    ),
    Architecture("U-Net", UNet, ("downs.*2", "bottleneck", "ups.*2", "head"), ("downs.0.a.weight",), ("out.weight",)),
    Architecture("LSTM tagger", Tagger, ("embed", "lstm", "attention", "tag"), ("embed.weight",), ("tag.weight",)),
    Architecture(
        "VAE",
        VAE,
        ("encoder", "mean", "log_variance", "decoder.0", "decoder.2"),
        ("encoder.0.weight",),
        ("decoder.2.weight",),
    ),
    Architecture(
        "nn.ModuleDict of blocks",
        DictOfBlocks,
        ("embedding", "parts.a", "parts.b", "parts.c", "head"),
        ("parts.in.weight",),
        ("parts.out.weight",),
    ),
    Architecture("sine", sine, ("0", "2", "4"), ("0.weight", "0.bias"), ("4.weight",)),
    Architecture(
        "U-Net with attributes",
        UNetWithAttributes,
        ("embedding", "down1", "down2", "down3", "up1", "up2", "up3", "head"),
        ("inside.weight",),
        ("outside.weight",),
    ),
    Architecture("nn.ParameterList", ListOfParameters, ("weights.*3",), ("weights.0",), ("weights.2", "scale")),
    Architecture("actor", Actor, ("net.0", "net.2"), ("net.0.weight",), ("net.2.weight", "log_std")),
    Architecture("siamese", Siamese, ("embedding", "left.1", "left.2", "head"), ("left.0.weight",), ("score.weight",)),
]
