"""Word counts -> the prior of the alignment loss (CoMP Eq. 9), and the file that keeps it.

p_i = max(n_i, 1) / sum_j max(n_j, 1) over the tokenizer's ids; n_i counts token i in the answers of the training data.
Made by `python -m comp_patches.word_prior --data_path mix.yaml --tokenizer ID --output prior.safetensors`. A file that
was counted over more rows than the tokenizer has ids (--vocab_size) makes words, seen once, of the padding rows too.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from comp_patches.checkpoint import write_atomically

# A model's table of word embeddings is padded to a round number of rows: Qwen2.5 has 151 936 for 151 665 ids. More
# than this many rows without a word means that the prior was counted with another tokenizer.
MAX_PADDING_ROWS = 512

# What every finished file says of itself. `vocabulary` is a hash: folders and hub ids may change what they hold.
ORIGIN = ("tokenizer", "vocabulary", "source", "seed")


def prior_from_counts(counts: Tensor) -> Tensor:
    """(V,) counts -> (V,) float32 that sums to 1; a word never seen counts as seen once."""
    seen = counts.to(torch.float64).clamp(min=1)
    return (seen / seen.sum()).float()


def fit_prior(prior: Tensor, vocab_size: int) -> Tensor:
    """The prior over a model's vocabulary: rows beyond the tokenizer's ids are no words and get exactly 0."""
    padding_rows = vocab_size - len(prior)
    if not 0 <= padding_rows <= MAX_PADDING_ROWS:
        padded = f" If the model is padded so far, add --vocab_size {vocab_size}." if padding_rows > 0 else ""
        raise ValueError(
            f"The word prior covers {len(prior)} tokens, but the model has {vocab_size} word embeddings. It was "
            "counted with another tokenizer: make it again with python -m comp_patches.word_prior --tokenizer MODEL."
            + padded
        )
    return torch.nn.functional.pad(prior, (0, padding_rows))


def save_counts(path: str | Path, counts: Tensor, **about: str) -> None:
    """Write (V,) counts, with all that is known `about` what they were counted from: `ORIGIN` and more."""
    metadata = about | {"vocab_size": str(len(counts))}
    tensors = {"counts": counts.to(torch.int64)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), lambda file: save_file(tensors, file, metadata=metadata))


def load_counts(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """Counts (V,) int64 and the metadata that `save_counts` wrote."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            counts, about = file.get_tensor("counts"), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"--word_prior or --merge {path} cannot be read ({error}). "
            "Make it with: python -m comp_patches.word_prior --data_path MIX --tokenizer MODEL --output FILE"
        ) from error
    if counts.dim() != 1 or counts.dtype != torch.int64 or (counts < 0).any():
        raise ValueError(
            f"--word_prior or --merge {path} holds {counts.dtype} {tuple(counts.shape)} or negative counts. Expected "
            "whole numbers of 0 or more, one for each word."
        )
    return counts, about


def load_prior(path: str | Path) -> Tensor:
    """The prior (V,) float32 over the tokenizer's ids that a file of counts stands for."""
    return prior_from_counts(load_counts(path)[0])


def merge_counts(paths: Sequence[str | Path]) -> tuple[Tensor, dict[str, str]]:
    """The sum of several files' counts, and what is known about the whole, which names all their sources and seeds.

    Raises:
        ValueError: A file comes twice or is not finished, or they count different words.
    """
    files = [(path, *_load_finished(path)) for path in paths]
    first_path, total, about = files[0][0], torch.zeros_like(files[0][1]), files[0][2]
    seen: set[Path] = set()
    for path, counts, found in files:
        if Path(path).resolve() in seen:
            raise ValueError(f"--merge {path} is there twice and would count double. Name each file once.")
        seen.add(Path(path).resolve())
        if found["vocabulary"] != about["vocabulary"]:
            raise ValueError(
                f"--merge {path} was counted with the tokenizer {found['tokenizer']}, but {first_path} with "
                f"{about['tokenizer']}, of another vocabulary. Only counts of the same words can be added."
            )
        if len(counts) != len(total):
            raise ValueError(
                f"--merge {path} covers {len(counts)} tokens, but {first_path} covers {len(total)}. "
                "Only counts of the same words can be added."
            )
        total += counts
    joined = {key: " + ".join(dict.fromkeys(found[key] for *_, found in files)) for key in ORIGIN}
    return total, joined | {key: value for key, value in about.items() if key == "padding_rows"}


def _load_finished(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    counts, about = load_counts(path)
    if "counted" in about:
        raise ValueError(f"--merge {path} holds the first {about['counted']} of {about['records']} records. Finish it.")
    if missing := [key for key in ORIGIN if key not in about]:
        raise ValueError(f"--merge {path} does not say its {' and '.join(missing)}. Count it again.")
    return counts, about


if __name__ == "__main__":
    from comp_patches.commands.word_prior import main

    main()
