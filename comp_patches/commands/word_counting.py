"""Counting the tokens of the answers in LLaVA records, by several processes.

A run of records is counted at a time, and the counts come back in the records' order. So the sum after any of them is
that of the first N records, whatever the number of processes: to go on, N is all that one has to know.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

RECORDS_AT_A_TIME = 5000
TEXTS_AT_A_TIME = 1000


def count_in_order(
    records: Sequence[dict], tokenizer: Any, vocab_size: int, *, first: int, workers: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Count `records[first:]` under a progress bar.

    Yields:
        How many records are counted now, and the counts (vocab_size,) int64 of the newest of them.
    """
    from rich.progress import MofNCompleteColumn, Progress

    starts = range(first, len(records), RECORDS_AT_A_TIME)
    runs = [range(start, min(start + RECORDS_AT_A_TIME, len(records))) for start in starts]
    processes = min(workers, len(runs))
    several = {"num_workers": processes, "multiprocessing_context": "fork"} if processes > 1 else {}
    # Of a DataLoader we use what is hard about processes: forked ones share the records with this one, which may be a
    # memory-mapped table; one that is killed is reported; all end when this one does.
    loader = DataLoader(
        _Counter(records, tokenizer, vocab_size),
        sampler=runs,
        batch_size=None,
        collate_fn=_as_it_is,
        worker_init_fn=_one_thread,
        **several,
    )
    counts_of_runs = iter(loader)  # forks, which the progress bar's thread should not see
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        task = progress.add_task("counting words", total=len(records), completed=first)
        for run, counts in zip(runs, counts_of_runs, strict=True):
            progress.update(task, completed=run.stop)
            yield run.stop, counts


class _Counter:
    """range of record numbers -> counts. NumPy, since torch's threads do not survive a fork."""

    def __init__(self, records: Sequence[dict], tokenizer: Any, vocab_size: int):
        self.records, self.tokenizer, self.vocab_size = records, tokenizer, vocab_size

    def __getitem__(self, run: range) -> np.ndarray:
        answers = answers_of(self.records[index] for index in run)
        return count_tokens(answers, self.tokenizer, self.vocab_size)


def _as_it_is(counts: np.ndarray) -> np.ndarray:
    """Not as a tensor, which would come through shared memory: a container often has 64 MB of it."""
    return counts


def _one_thread(_: int) -> None:
    """The tokenizer would start as many threads as there are cores, in each process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


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


def count_tokens(texts: Iterable[str], tokenizer: Any, vocab_size: int) -> np.ndarray:
    """(vocab_size,) int64: how often each token occurs in the texts, no special tokens added."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    texts = iter(texts)
    while batch := list(islice(texts, TEXTS_AT_A_TIME)):
        # verbose: an answer longer than the model's context is no reason to warn, only counted.
        ids = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        counts += np.bincount(np.fromiter(chain.from_iterable(ids), dtype=np.int64), minlength=vocab_size)
    return counts
