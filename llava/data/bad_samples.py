"""Samples that cannot be trained on: told apart, counted, logged, never replaced by another.

A bad sample leaves its slot in the micro-batch empty. The dataset returns a `BadSample` for it (maybe in a worker
process), the collator passes it on with the batch, and the trainer's `BadSampleLedger` counts it in the main process.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)

FIRST_SAMPLES = 1000  # as long as fewer were seen, the share is taken of so many: one early bad sample proves nothing


class BadSampleError(ValueError):
    """This record cannot be made into a sample; the others may well be.

    Args:
        kind: What is bad, in a word or two: one of many alike in a report.
    """

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.kind = kind


class TooManyBadSamplesError(ValueError):
    """The share of bad samples is above `--max_bad_samples`."""


@dataclass(frozen=True)
class BadSample:
    """What stands in a bad sample's slot."""

    id: str
    reason: str
    kind: str = "other"


class BadSampleLedger:
    """Counts the bad samples of a run, of all its processes, and ends it when their share is above what is allowed.

    Args:
        max_bad_samples: Allowed share, 0 to 1 (`--max_bad_samples`).
        dataset_size: Samples in an epoch.
    """

    def __init__(self, max_bad_samples: float, dataset_size: int) -> None:
        if not 0 <= max_bad_samples <= 1:
            raise ValueError(f"max_bad_samples={max_bad_samples} is no share: expected a number from 0 to 1.")
        self.max_bad_samples = max_bad_samples
        self.num_seen = 0
        self.num_bad = 0
        self._least_seen = min(FIRST_SAMPLES, dataset_size)
        self._last: BadSample | None = None  # of this process

    def update(
        self,
        bad_samples: Sequence[BadSample],
        *,
        num_seen: int,
        over_processes: Callable[[list[int]], list[int]] = list,
    ) -> None:
        """Take in `num_seen` samples, `bad_samples` among them.

        Args:
            over_processes: Sums counts over the processes of a run. All update together, so all end together.
        """
        for bad in bad_samples:
            self._last = bad
            logger.warning("skipped bad sample %s: %s", bad.id, bad.reason)
        new_bad, new_seen = over_processes([len(bad_samples), num_seen])
        self.num_bad += new_bad
        self.num_seen += new_seen
        if new_bad and self.num_bad > self.max_bad_samples * max(self.num_seen, self._least_seen):
            last = f"The last is {self._last.id}: {self._last.reason}. " if self._last else ""
            raise TooManyBadSamplesError(
                f"{self.num_bad} of the first {self.num_seen} samples are bad, more than max_bad_samples="
                f"{self.max_bad_samples:g} allows. {last}Mend the data, or raise --max_bad_samples."
            )

    def log_summary(self) -> None:
        """One line for the end of the run."""
        logger.info("%d of %d samples were bad and skipped", self.num_bad, self.num_seen)
