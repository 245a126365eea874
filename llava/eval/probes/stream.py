"""Which samples a step sees, whatever the number of processes, and after a stop as without one. B = global batch."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

Key = tuple[int | None, int]  # epoch (None: no augmentation) and index of a sample


class TrainingSteps(Sampler[list[Key]]):
    """The micro-batches of one process: epochs laid end to end, cut into steps of B samples, B shared out by turns.

    Args:
        size: samples of an epoch.
        steps: where training ends.
        start: steps that are done.
        micro_batch: samples of this process at once; a step takes several where its share is larger.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        steps: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        micro_batch: int | None = None,
        seed: int = 0,
    ):
        share = batch_size // world
        self.micro_batch = min(micro_batch or share, share)
        if size < 1 or share * world != batch_size or share % self.micro_batch:
            raise ValueError(
                f"a batch of {batch_size} cannot be shared by {world} process(es) in micro-batches of "
                f"{self.micro_batch} over {size} samples: --batch_size should be a multiple of both."
            )
        self.size, self.batch_size, self.steps, self.start = size, batch_size, steps, start
        self.rank, self.world, self.seed = rank, world, seed
        self.accumulation = share // self.micro_batch

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, []
        for step in range(self.start, self.steps):
            keys = []
            for position in range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = self._order(epoch)
                keys.append((epoch, order[position % self.size]))
            for first in range(0, len(keys), self.micro_batch):
                yield keys[first : first + self.micro_batch]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        return torch.randperm(self.size, generator=generator).tolist()


def evaluation_batches(size: int, batch_size: int, rank: int = 0, world: int = 1) -> list[list[Key]]:
    """This process's share of all samples, each once."""
    keys: list[Key] = [(None, index) for index in range(rank, size, world)]
    return [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]


def generator_of(seed: int, key: Key) -> random.Random:
    """The randomness of one sample in one epoch: the same in any worker, and again after a resume."""
    epoch, index = key
    return random.Random(f"{seed}/{epoch}/{index}")  # noqa: S311  augmentation, no secret
