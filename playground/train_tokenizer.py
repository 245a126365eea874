"""Trains the LLM's tokenizer: a byte-level BPE cut like Qwen2's (one digit at a time), on the text-only corpus.

`python -m playground.train_tokenizer --output playground/models/llm` takes seconds.
"""

import argparse
import itertools
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from playground.corpus import END_OF_TEXT, TURN_END, TURN_START, training_texts

VOCABULARY = 1280
_TEXTS = 8000
# Qwen2's cut: contractions, words with their space, single digits, punctuation, white space.
_QWEN2_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer of the corpus; its ids are the same on every machine."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_CUT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, normalized=False, special=True) for token in (END_OF_TEXT, TURN_START, TURN_END)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = itertools.islice(training_texts("tokenizer"), _TEXTS)
    pieces = ("".join(piece for piece, _ in spans) for spans in texts)
    bpe.train_from_iterator(pieces, trainer)
    return Qwen2Tokenizer(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        unk_token=None,
        additional_special_tokens=[TURN_START],
        model_max_length=2048,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m playground.train_tokenizer", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the LLM")
    args = parser.parse_args(argv)
    tokenizer = train_tokenizer()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: tokenizer of {len(tokenizer)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
