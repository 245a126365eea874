"""The order of an epoch under `--group_by_modality_length`: a step's batches share a modality and have even lengths."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """Every sample once per epoch, in steps of `batches_per_step` batches of `batch_size` samples.

    All samples of a step have images, or none has; its batches (which go to the ranks, and to a rank's accumulation
    steps) are about equally long. The samples left over from whole steps come last, those with images first. The order
    depends on `seed` and the epoch alone.

    Args:
        lengths: Per sample, positive with an image, negative without (`LLaVADataset.modality_lengths`).
        batch_size: Samples of a micro-batch.
        batches_per_step: Micro-batches of a step: ranks times accumulation steps.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, batches_per_step: int, seed: int = 0) -> None:
        if 0 in lengths:
            raise ValueError(f"sample {list(lengths).index(0)} has length 0, which tells neither modality.")
        self.lengths = lengths
        self.batch_size = batch_size
        self.step_size = batch_size * batches_per_step
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; called by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        steps, rest = [], []
        for has_image in (True, False):
            indices = [index for index in order if (self.lengths[index] > 0) is has_image]
            num_whole = len(indices) // self.step_size * self.step_size
            steps += [indices[start : start + self.step_size] for start in range(0, num_whole, self.step_size)]
            rest += indices[num_whole:]
        for step in torch.randperm(len(steps), generator=generator).tolist():
            yield from self._even_batches(steps[step])
        yield from rest

    def _even_batches(self, step: list[int]) -> list[int]:
        """The step's samples reordered so that its batches are about equally long: the longest sample left goes to the
        batch that is shortest so far and still has room."""
        batches: list[list[int]] = [[] for _ in range(len(step) // self.batch_size)]
        totals = [0] * len(batches)
        for index in sorted(step, key=lambda index: -abs(self.lengths[index])):
            open_batches = [number for number, batch in enumerate(batches) if len(batch) < self.batch_size]
            shortest = min(open_batches, key=totals.__getitem__)
            batches[shortest].append(index)
            totals[shortest] += abs(self.lengths[index])
        return [index for batch in batches for index in batch]
