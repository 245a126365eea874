"""Count the words of a data mixture's answers: `python -m comp_patches.word_prior`.

A file that was counted from the same data, vocabulary and seed is kept. A run that was stopped is continued by the same
command: how far it came lies beside the output, in OUTPUT.partial, until it is done.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from comp_patches.commands.word_counting import count_in_order
from comp_patches.word_prior import load_counts, merge_counts, save_counts


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, count or merge, write."""
    from llava.utils import mistakes_in_one_line, positive_int

    parser = argparse.ArgumentParser(prog="python -m comp_patches.word_prior", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_path", help="LLaVA JSON, or the YAML mixture of Stage II; needs --tokenizer")
    source.add_argument("--merge", nargs="+", metavar="FILE", help="add these files of counts instead")
    parser.add_argument("--tokenizer", help="folder or hub id of the LLM's tokenizer")
    parser.add_argument("--output", required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, help="of the mixture's draw: the training's (default: its, 42)")
    parser.add_argument("--workers", type=positive_int, help="processes (default: the cores)")
    parser.add_argument(
        "--vocab_size",
        type=positive_int,
        help="rows of the LLM's word embeddings: those beyond the tokenizer's ids count as words seen once. By default "
        "the file covers the tokenizer's ids, and such padding rows get no mass",
    )
    options = parser.parse_args(arguments)
    if (options.tokenizer is None) != (options.data_path is None):
        parser.error("--data_path and --tokenizer go together; --merge takes the tokenizer that its files name")
    counting = {name: getattr(options, name) for name in ("seed", "workers", "vocab_size")}
    counting = {name: value for name, value in counting.items() if value is not None}
    if options.merge and counting:
        parser.error(f"--{next(iter(counting))} is for counting; --merge adds what was counted")

    with mistakes_in_one_line():
        if options.merge:
            merge(options.merge, options.output)
        else:
            run(options.data_path, options.tokenizer, options.output, **counting)


def num_cores() -> int:
    """The cores that this process may use, where the system says so (Linux), else the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def merge(files: Sequence[str], output: str) -> None:
    """Add the counts of several files."""
    counts, about = merge_counts(files)
    save_counts(output, counts, **about)
    report(output, counts)


def run(
    data_path: str,
    tokenizer_name: str,
    output: str,
    *,
    seed: int = 42,
    workers: int | None = None,
    vocab_size: int | None = None,
) -> None:
    """Read the records that a training with this seed reads, count their answers' tokens, save the counts."""
    from llava.data.mixture import load_records

    about = {"tokenizer": tokenizer_name, "source": data_path, "seed": str(seed)}
    if Path(tokenizer_name).is_dir():  # it may hold another tokenizer by now, where a hub id's stays
        about["vocabulary"] = hash_of_vocabulary(load_tokenizer(tokenizer_name))
    if is_current(output, vocab_size, **about):
        print(f"{output}: kept, counted from {data_path}")  # noqa: T201
        return
    tokenizer = load_tokenizer(tokenizer_name)
    about["vocabulary"] = hash_of_vocabulary(tokenizer)
    data = state_of_data(data_path)
    records = load_records(data_path, seed=seed)
    size, padding = rows_to_count(tokenizer, vocab_size)
    partial = Path(f"{output}.partial")
    # What a partial count must agree with to be continued: order and number of the records hang on the data alone.
    begun = about | {"vocab_size": str(size), "data": data, "records": str(len(records))}
    counts, first = counted_before(partial, size, begun)
    if first:
        print(f"{partial}: continued after {first} of {len(records)} records")  # noqa: T201
    try:
        for done, part in count_in_order(records, tokenizer, size, first=first, workers=workers or num_cores()):
            counts += torch.from_numpy(part)
            if done < len(records):
                save_counts(partial, counts, **about, data=data, records=begun["records"], counted=str(done))
    except KeyboardInterrupt:
        sys.exit("stopped: the same command continues from what was counted" if partial.exists() else "stopped")
    if state_of_data(data_path) != data:
        raise ValueError(f"--data_path {data_path}: its files changed while they were counted. Start again.")
    save_counts(output, counts, **about, **padding)
    partial.unlink(missing_ok=True)
    report(output, counts)


def report(output: str, counts: Tensor) -> None:
    """What was counted, in a line."""
    seen = int((counts > 0).sum())
    print(f"{output}: {int(counts.sum())} tokens, {seen} of {len(counts)} words seen")  # noqa: T201


def load_tokenizer(name: str):
    """From a folder or the hub."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def hash_of_vocabulary(tokenizer) -> str:
    """The same for the same words with the same ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def is_current(output: str, vocab_size: int | None, **wanted: str) -> bool:
    """Whether the file says that it was counted from what is `wanted`, and no data file is newer than it."""
    try:
        counts, found = load_counts(output)
    except ValueError:
        return False  # not there, or no counts
    same_rows = "padding_rows" not in found if vocab_size is None else len(counts) == vocab_size
    counted = Path(output).stat().st_mtime
    return (
        same_rows
        and wanted.items() <= found.items()
        and all(file.stat().st_mtime <= counted for file in data_files(wanted["source"]))
    )


def counted_before(partial: Path, size: int, begun: dict[str, str]) -> tuple[Tensor, int]:
    """The counts (size,) of an earlier run that was stopped, and how many records are in them; else none of either."""
    try:
        counts, found = load_counts(partial)
    except ValueError:
        found = {}
    if begun.items() <= found.items():
        return counts, int(found["counted"])
    return torch.zeros(size, dtype=torch.int64), 0


def rows_to_count(tokenizer, vocab_size: int | None) -> tuple[int, dict[str, str]]:
    """How many rows to count over, and what the file says of those that are no ids of the tokenizer, if any."""
    ids = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    if vocab_size is None or vocab_size == ids:
        return ids, {}
    if vocab_size < ids:
        raise ValueError(f"--vocab_size {vocab_size} is less than the tokenizer's {ids} ids.")
    return vocab_size, {"padding_rows": str(vocab_size - ids)}


def state_of_data(data_path: str) -> str:
    """What the data files are now: another text after any of them was changed."""
    states = ((file, file.stat()) for file in data_files(data_path))
    return " ".join(f"{file}:{state.st_size}:{state.st_mtime_ns}" for file, state in states)


def data_files(data_path: str) -> list[Path]:
    """The file itself, or those that a mixture names, and of a folder those in it; only those that are there."""
    from llava.data.mixture import read_mixture
    from llava.data.sources import source_files

    path = Path(data_path)
    if path.suffix in (".yaml", ".yml") and path.exists():
        sources = [path.parent / source["json_path"] for source in read_mixture(path)]
        files = [path, *(file for source in sources if source.exists() for file in source_files(source))]
    else:
        files = source_files(path) if path.is_dir() else [path]
    return [file for file in files if file.exists()]
