"""A tokenizer for a model that starts from random weights: byte-level BPE, trained on text files, saved to a folder.

``python examples/train_tokenizer.py data/viggo/train.csv --folder tokenizer --size 2000``, then
``--data.tokenizer tokenizer`` and a ``vocab_size`` of 2000 in ``model_config``.
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"  # also pads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--size", type=int, default=8000, help="number of tokens, at least 257")
    options = parser.parse_args()

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train(
        options.files, trainers.BpeTrainer(vocab_size=options.size, initial_alphabet=alphabet, special_tokens=[END])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(options.folder)

    text = "".join(Path(file).read_text() for file in options.files)
    num_bytes, num_tokens = len(text.encode()), len(tokenizer(text).input_ids)
    print(f"bytes of text per token, with {len(tokenizer)} tokens in all: {num_bytes / num_tokens:.2f}")


if __name__ == "__main__":
    main()
