"""How evenly an epoch is dealt out: `python scripts/bench/sampler.py` compares orders on a drawn mix of lengths.

Work is counted in tokens. Of ranks that work at the same time, those that have less wait for the one that has most.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from rich.console import Console
from rich.table import Table
from timing import show
from torch.utils.data import BatchSampler, RandomSampler

from llava.data.sampler import BalancedBatchSampler

MAX_LENGTH = 8000
LIMITS = 4, 3000  # visual tokens of an image
# Share of the samples, images of a sample, median of an image's visual tokens, spread (of its logarithm)
SOURCES = {
    "documents": (0.25, 1, 2000, 0.4),
    "photos": (0.35, 1, 450, 0.4),
    "charts": (0.15, 1, 250, 0.5),
    "several images": (0.08, 3, 400, 0.5),
    "videos": (0.05, 8, 400, 0.3),
    "text": (0.12, 0, 1, 0.0),
}

Order = Callable[[int], list[list[int]]]  # rank -> its micro-batches


def draw_mix(num_samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each sample, and what it is taken for where an image counts as its source's mean; negative without."""
    shares, images, medians, spreads = np.array(list(SOURCES.values())).T
    source = rng.choice(len(SOURCES), num_samples, p=shares)
    image = (medians[source] * np.exp(spreads[source] * rng.standard_normal(num_samples))).clip(*LIMITS).astype(int)
    mean = (np.bincount(source, image, len(SOURCES)) / np.bincount(source, minlength=len(SOURCES)).clip(1)).astype(int)
    text, images = rng.lognormal(4.5, 0.9, num_samples).clip(10, 3000).astype(int), images[source].astype(int)
    sign = np.where(images > 0, 1, -1)
    return tuple(sign * (text + images * tokens).clip(1, MAX_LENGTH) for tokens in (image, mean[source]))


def transformers_order(num_samples: int, batch_size: int, num_ranks: int) -> Order:
    """A shuffled order cut into micro-batches that accelerate hands to the ranks in turn."""
    order = list(RandomSampler(range(num_samples), generator=torch.Generator().manual_seed(0)))
    return lambda rank: list(BatchSamplerShard(BatchSampler(order, batch_size, False), num_ranks, rank))


def figures(order: Order, tokens: np.ndarray, num_ranks: int, turns: int) -> list[str]:
    """The cells of a row."""
    ranks = [order(rank) for rank in range(num_ranks)]
    loads = np.array([[tokens[batch].sum() for batch in rank] for rank in ranks])  # (ranks, micro-batches)
    seen = np.bincount([sample for rank in ranks for batch in rank for sample in batch], minlength=len(tokens))
    whole = loads[:, : loads.shape[1] // turns * turns].reshape(num_ranks, -1, turns)
    padded = sum(len(batch) * tokens[batch].max() for rank in ranks for batch in rank if batch)
    return [
        f"{int((seen - 1).clip(0).sum())}, {int((seen == 0).sum())}",
        str(loads.shape[1]),
        f"{100 * waiting(loads):.1f} %",
        f"{100 * waiting(whole.sum(axis=2)):.1f} %",
        f"{int(np.median(loads))}, {int(loads.max())}",
        f"{100 * (1 - loads.sum() / padded):.0f} %",
    ]


def waiting(loads: np.ndarray) -> float:
    """Share of the ranks' time that is spent waiting for the one with most tokens: (ranks, occasions)."""
    return 1 - loads.mean(axis=0).sum() / loads.max(axis=0).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20001)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4, help="micro-batches that a rank accumulates")
    options = parser.parse_args()
    lengths, taken_for = draw_mix(options.samples, np.random.default_rng(0))

    def balanced(lengths: np.ndarray, **how: object) -> Order:
        layout = {"batch_size": options.batch_size, "num_ranks": options.ranks, "turns": options.turns} | how
        return lambda rank: list(BalancedBatchSampler(lengths, rank=rank, **layout))

    packed = {"max_pack": MAX_LENGTH, "batch_size": 1}
    orders = {
        "transformers' and accelerate's": transformers_order(options.samples, options.batch_size, options.ranks),
        "ours": balanced(lengths),
        "ours, lengths estimated": balanced(taken_for),
        "--group_by_modality_length": balanced(lengths, by_modality=True),
        "--group_by_modality_length, lengths estimated": balanced(taken_for, by_modality=True),
        "--pack_to_max_length": balanced(lengths, **packed),
        "--pack_to_max_length, lengths estimated": balanced(taken_for, **packed),
    }
    columns = (
        "seen again, never",
        "micro-batches",
        "waiting",
        "in a step",
        "tokens: median, most",
        "padding, were they padded",
    )
    table = Table("order", *columns)
    for name, order in orders.items():
        table.add_row(name, *figures(order, np.abs(lengths), options.ranks, options.turns))
    show(table, Console(width=160))


if __name__ == "__main__":
    main()
