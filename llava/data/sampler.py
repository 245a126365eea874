"""Which samples a rank takes, and in which micro-batch: every sample once an epoch, and all ranks equally long at work.

    an epoch, shuffled  ->  steps  ->  a step's turns (as many as it accumulates)  ->  a micro-batch for each rank

Which samples make up a step follows from the seed, the epoch and the step's size, on any number of ranks; lengths
decide only who takes which. Under `--pack_to_max_length` all that is said of samples is true of packs of samples.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapreplace
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import Sampler

WINDOW = 1024  # samples that are packed together: a pack has its like at any place of the data


class BalancedBatchSampler(Sampler[list[int]]):
    """One rank's micro-batches; the ranks' together are the epoch.

    Every rank has the same number of them, `len()`, in all epochs. A last step that is short has short micro-batches,
    and where a turn has fewer samples than ranks, empty ones. Ranks are even in tokens: in a turn, and over a step, no
    two differ by more than the longest sample there.

    Args:
        lengths: (samples,) about how many tokens each has, negative without an image (`LLaVADataset.modality_lengths`).
        batch_size: Samples of a micro-batch, on average over the ranks: more short ones, or fewer long ones.
        turns: Micro-batches that a rank accumulates in a step.
        by_modality: All samples of a step have an image, or none has; those left over from whole steps come last, with
            images first. And of a step, samples of like lengths meet (LLaVA's `--group_by_modality_length`).
        max_pack: Tokens that samples are packed to (`--pack_to_max_length`). Packs are made once, by the seed, and
            epochs shuffle them. Unset: no packs.
        drop_last: Leave out what makes no whole micro-batch for all ranks.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        turns: int = 1,
        by_modality: bool = False,
        max_pack: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        lengths = np.asarray(lengths, dtype=np.int64)
        if not lengths.all():
            raise ValueError(f"sample {lengths.tolist().index(0)} has length 0, which tells neither modality.")
        self.rank, self.num_ranks, self.turns = rank, num_ranks, turns
        self.turn_size = batch_size * num_ranks  # samples, over the ranks
        self.seed, self.epoch = seed, 0
        self.by_modality, self.drop_last = by_modality, drop_last
        tokens, kinds = np.abs(lengths), lengths > 0 if by_modality else np.ones(len(lengths), bool)
        self._members = np.arange(len(lengths))
        self._starts = np.arange(len(lengths) + 1)  # pack k is members[starts[k] : starts[k + 1]]
        if max_pack is not None:
            order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).numpy()
            packs = [pack for kind in (True, False) for pack in _packs(order[kinds[order] == kind], tokens, max_pack)]
            self._members = np.array([sample for pack in packs for sample in pack], dtype=np.int64)
            self._starts = np.cumsum([0, *map(len, packs)])
        self.tokens = np.diff(np.concatenate([[0], np.cumsum(tokens[self._members])])[self._starts])
        self._kinds = kinds[self._members[self._starts[:-1]]]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; called by the trainer."""
        self.epoch = epoch

    @property
    def samples_per_pack(self) -> float:
        return len(self._members) / max(len(self.tokens), 1)

    def packing(self) -> str:
        """What has come of packing, for people."""
        return (
            f"{len(self._members)} samples in {len(self.tokens)} packs, on average {self.samples_per_pack:.1f} samples "
            f"and {self.tokens.mean():.0f} tokens each; a step has {self.turn_size * self.turns} packs."
        )

    def fingerprint(self) -> int:
        """The same on all ranks, or each would take its share of another epoch."""
        return crc32(self._members, crc32(self.tokens * np.where(self._kinds, 1, -1)))

    def __len__(self) -> int:
        turns = len(self.tokens) / self.turn_size
        return math.floor(turns) if self.drop_last else math.ceil(turns)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps():
            loads = np.zeros(self.num_ranks, dtype=np.int64)  # of the ranks in this step so far
            for turn in self._turns(step):
                hands = deal(self.tokens[turn], self.num_ranks)
                totals = np.array([self.tokens[turn[hand]].sum() for hand in hands])
                order = np.empty_like(loads)
                order[np.argsort(loads, kind="stable")] = np.argsort(-totals, kind="stable")  # the least gets the most
                loads += totals[order]
                yield [sample for pack in turn[hands[order[self.rank]]] for sample in self._pack(pack)]

    def _steps(self) -> Iterator[np.ndarray]:
        """The packs of each step of the epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.tokens), generator=generator).numpy()
        size = self.turn_size * self.turns
        of_kinds = [order[self._kinds[order] == kind] for kind in (True, False)]
        whole = [packs[: len(packs) // size * size].reshape(-1, size) for packs in of_kinds]
        rest = np.concatenate([packs[len(packs) // size * size :] for packs in of_kinds])
        if self.drop_last:
            rest = rest[: len(rest) // self.turn_size * self.turn_size]
        steps = np.concatenate(whole)
        yield from steps[torch.randperm(len(steps), generator=generator).numpy()]
        yield from (rest[start : start + size] for start in range(0, len(rest), size))

    def _turns(self, step: np.ndarray) -> list[np.ndarray]:
        """What all ranks together take at a time. By modality and length, they are handed samples of like lengths."""
        num_turns = math.ceil(len(step) / self.turn_size)
        if not self.by_modality:
            return np.array_split(step, num_turns)
        step = step[np.argsort(-self.tokens[step], kind="stable")]
        alike = [step[start : start + self.num_ranks] for start in range(0, len(step), self.num_ranks)]
        return [np.concatenate(alike[turn::num_turns]) for turn in range(num_turns)]

    def _pack(self, number: int) -> list[int]:
        return self._members[self._starts[number] : self._starts[number + 1]].tolist()


def deal(tokens: np.ndarray, num_hands: int) -> list[list[int]]:
    """Places of `tokens` dealt out: the longest first, each to the hand that holds least.

    So no two hands differ by more than the longest: whichever ends with most held least when it got its last.
    """
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    loads = [(0, hand) for hand in range(num_hands)]  # a heap
    for place in np.argsort(-tokens, kind="stable").tolist():
        load, hand = loads[0]
        hands[hand].append(place)
        heapreplace(loads, (load + int(tokens[place]), hand))
    return hands


def _packs(order: np.ndarray, tokens: np.ndarray, most: int) -> Iterator[list[int]]:
    """Samples, WINDOW of them at a time, packed to at most so many tokens: the longest first, each into the fullest
    pack that has room for it. One that is longer by itself is a pack of its own."""
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        window = window[np.argsort(-tokens[window], kind="stable")]
        packs: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # room and number of each pack, the fullest first
        for sample, length in zip(window.tolist(), tokens[window].tolist(), strict=True):
            fullest = bisect_left(rooms, (length, 0))
            room, number = rooms.pop(fullest) if fullest < len(rooms) else (most, len(packs))
            if number == len(packs):
                packs.append([])
            packs[number].append(sample)
            insort(rooms, (room - length, number))
        yield from packs
