"""Is B better than A on the very same questions or captions?

    python -m llava.eval.paired --a A.jsonl --b B.jsonl [--subset large]

Two tests, because facts (and questions) of one image stand or fall together:
  McNemar's exact test over single facts or questions, which takes them as independent;
  the sign test over images (in how many does B have more right than A?), which does not.
The interval of the difference is a bootstrap over images.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llava.eval.results import read_rows, write_json
from llava.eval.scoring import Row, is_large, row_hits
from llava.eval.text_table import percent
from llava.utils import mistakes_in_one_line, positive_int

BOOTSTRAP_ROUNDS = 10_000


@dataclass(frozen=True)
class PairedComparison:
    """B against A on the same images.

    Attributes:
        num_images: Images that the rows are about; num_scored: facts or questions.
        accuracy_a, accuracy_b: Share of them that is right; difference = b - a, interval = its 95 % bootstrap interval.
        only_a, only_b: Facts or questions that one alone has right; mcnemar_p is of these.
        images_a, images_b: Images of which one has more right than the other; sign_p is of these.
    """

    num_images: int
    num_scored: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    interval: tuple[float, float]
    only_a: int
    only_b: int
    mcnemar_p: float
    images_a: int
    images_b: int
    sign_p: float


def compare(rows_a: list[Row], rows_b: list[Row], *, seed: int = 0) -> PairedComparison:
    """Compare two result files of the same held-out records, matched by id.

    Raises:
        ValueError: They are not of the same records.
    """
    images = sorted(_hits_by_image(rows_a, rows_b).items())
    totals = np.array([[len(a), sum(a), sum(b)] for _, (a, b) in images])  # per image: scored, right in A, right in B
    pairs = [pair for _, (a, b) in images for pair in zip(a, b, strict=True)]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    scored, right_a, right_b = totals.sum(axis=0).tolist()
    images_a, images_b = int((totals[:, 1] > totals[:, 2]).sum()), int((totals[:, 2] > totals[:, 1]).sum())
    return PairedComparison(
        num_images=len(images),
        num_scored=scored,
        accuracy_a=right_a / scored,
        accuracy_b=right_b / scored,
        difference=(right_b - right_a) / scored,
        interval=_bootstrap_interval(totals, seed),
        only_a=only_a,
        only_b=only_b,
        mcnemar_p=two_sided_binomial(only_a, only_b),
        images_a=images_a,
        images_b=images_b,
        sign_p=two_sided_binomial(images_a, images_b),
    )


def two_sided_binomial(wins: int, losses: int) -> float:
    """The exact p of a split at least as uneven as this one, were both sides equally likely. In whole numbers."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n) if n else 1.0


def large_only(rows: list[Row], fixed_size: int) -> list[Row]:
    """The rows about images that are not square and above 1.5 times the fixed area."""
    rows = [row for row in rows if is_large(row, fixed_size)]
    if not rows:
        raise ValueError(f"no row is about a non-square image above 1.5 times the area of --fixed-size {fixed_size}.")
    return rows


def _hits_by_image(rows_a: list[Row], rows_b: list[Row]) -> dict[str, tuple[list[bool], list[bool]]]:
    """Image -> what A and what B has right, in the same order."""
    by_id = {row["id"]: row for row in rows_b}
    ids = {row["id"] for row in rows_a}
    if ids != by_id.keys() or len(ids) != len(rows_a) or len(ids) != len(rows_b):
        odd = sorted(ids ^ by_id.keys())
        raise ValueError(
            f"A has {len(rows_a)} rows and B {len(rows_b)}, and {len(odd)} ids are in one alone"
            f"{f', the first {odd[0]}' if odd else ''}. A paired test needs the same records, each once."
        )
    images: dict[str, tuple[list[bool], list[bool]]] = {}
    for row in rows_a:
        other = by_id[row["id"]]
        if (row["answer"], row.get("facts")) != (other["answer"], other.get("facts")):
            raise ValueError(f"{row['id']} has another answer in A than in B. Are they of the same data?")
        hits_a, hits_b = images.setdefault(row["image"], ([], []))
        hits_a += row_hits(row)
        hits_b += row_hits(other)
    return images


def _bootstrap_interval(totals: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % of the differences in accuracy when images are drawn with replacement. totals: (images, 3)."""
    random = np.random.default_rng(seed)
    n = len(totals)
    counts = random.multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP_ROUNDS)  # how often each image is drawn
    scored, right_a, right_b = (counts @ totals).T
    low, high = np.percentile((right_b - right_a) / scored, [2.5, 97.5])
    return float(low), float(high)


def describe(comparison: PairedComparison) -> str:
    """The comparison in four lines."""
    c = comparison
    low, high = c.interval
    return "\n".join(
        [
            f"n = {c.num_images} images, {c.num_scored} facts or questions",
            f"A {percent(c.accuracy_a)}   B {percent(c.accuracy_b)}   "
            f"B - A {100 * c.difference:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}",
            f"McNemar: {c.only_a} right in A alone, {c.only_b} in B alone, p = {c.mcnemar_p:.2g}",
            f"sign test over images: A better in {c.images_a}, B in {c.images_b}, p = {c.sign_p:.2g}",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """The command. A mistake in flags or files is one line on stderr and a non-zero exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.paired", description=__doc__.splitlines()[0])
    parser.add_argument("--a", required=True, type=Path, help="result file of python -m llava.eval.held_out")
    parser.add_argument("--b", required=True, type=Path, help="another of the same records")
    parser.add_argument("--subset", choices=("all", "large"), default="all")
    parser.add_argument("--fixed-size", type=positive_int, default=192, help="'large' is measured against this square")
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    args = parser.parse_args(argv)
    with mistakes_in_one_line():
        rows_a, rows_b = read_rows(args.a), read_rows(args.b)
        if args.subset == "large":
            rows_a, rows_b = large_only(rows_a, args.fixed_size), large_only(rows_b, args.fixed_size)
        comparison = compare(rows_a, rows_b)
        if args.output:
            write_json(args.output, asdict(comparison))
    sys.stdout.write(describe(comparison) + "\n")


if __name__ == "__main__":
    main()
