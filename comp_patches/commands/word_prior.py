"""Count the words of a data mixture's answers: `python -m comp_patches.word_prior`.

A file that was counted from the same data, tokenizer and seed is kept.
"""

import argparse
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from comp_patches.word_prior import load_counts, save_counts

TEXTS_AT_A_TIME = 1000


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, count, write."""
    parser = argparse.ArgumentParser(prog="python -m comp_patches.word_prior", description=__doc__)
    parser.add_argument("--data_path", required=True, help="LLaVA JSON, or the YAML mixture of Stage II")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of the LLM's tokenizer")
    parser.add_argument("--output", required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=42, help="of the mixture's draw: the training's (default: its, 42)")
    options = parser.parse_args(arguments)
    from llava.utils import mistakes_in_one_line

    with mistakes_in_one_line():
        run(options.data_path, options.tokenizer, options.output, options.seed)


def run(data_path: str, tokenizer_name: str, output: str, seed: int) -> None:
    """Read the records that a training with this seed reads, count their answers' tokens, save the counts."""
    if is_current(output, tokenizer=tokenizer_name, source=data_path, seed=str(seed)):
        print(f"{output}: kept, counted from {data_path}")  # noqa: T201
        return
    from rich.progress import track
    from transformers import AutoTokenizer

    from llava.data.mixture import load_records

    records = load_records(data_path, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    answers = answers_of(track(records, description="counting words"))
    counts = count_tokens(answers, tokenizer, vocab_size)
    save_counts(output, counts, tokenizer=tokenizer_name, source=data_path, seed=seed)
    seen = int((counts > 0).sum())
    print(f"{output}: {int(counts.sum())} tokens, {seen} of {vocab_size} words seen")  # noqa: T201


def is_current(output: str, **wanted: str) -> bool:
    """Whether the file says that it was counted from what is `wanted`, and no data file is newer than it."""
    try:
        _, found = load_counts(output)
    except ValueError:
        return False  # not there, or no counts
    counted = Path(output).stat().st_mtime
    files = (file for file in data_files(wanted["source"]) if file.exists())
    return wanted.items() <= found.items() and all(file.stat().st_mtime <= counted for file in files)


def data_files(data_path: str) -> list[Path]:
    """The file itself and, of a mixture, those that it names."""
    from llava.data.mixture import read_mixture

    path = Path(data_path)
    if path.suffix == ".json" or not path.exists():
        return [path]
    return [path, *(path.parent / source["json_path"] for source in read_mixture(path))]


def answers_of(records: Iterable[dict]) -> Iterator[str]:
    """The text of every answer in LLaVA records; a record whose turns training would refuse counts for nothing."""
    from llava.data.bad_samples import BadSampleError
    from llava.data.records import read_turn

    for record in records:
        try:
            turns = [read_turn(turn, index) for index, turn in enumerate(record["conversations"])]
        except BadSampleError:
            continue
        yield from (text for role, text in turns if role == "assistant")


def count_tokens(texts: Iterable[str], tokenizer, vocab_size: int) -> Tensor:
    """(vocab_size,) int64: how often each token occurs in the texts, no special tokens added."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    texts = iter(texts)
    while batch := list(islice(texts, TEXTS_AT_A_TIME)):
        ids = list(chain.from_iterable(tokenizer(batch, add_special_tokens=False)["input_ids"]))
        counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocab_size)
    return counts
