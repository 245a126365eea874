"""Tables, pictures and paired tests of what the runner measured."""

import statistics
from pathlib import Path

from llava.eval.paired import compare
from llava.eval.results import read_rows
from playground.ablations.held_out_sizes import SIZES
from playground.ablations.rows import ROWS
from playground.ablations.runner import SCORES, Unit, captions_of

Lines = list[dict[str, str]]  # of the CSV file


def render_table(rows: tuple[str, ...], lines: Lines) -> str:
    """Markdown: each row's mean ± standard deviation over its seeds, in percent."""
    rendered = [f"| row | seeds | {' | '.join(SCORES)} |", f"|---|{'---|' * (len(SCORES) + 1)}"]
    for row in rows:
        of_row = [line for line in lines if line["row"] == row]
        if of_row:
            cells = (spread(percentages(of_row, score)) for score in SCORES)
            rendered.append(f"| {row} | {len(of_row)} | {' | '.join(cells)} |")
    return "\n".join(rendered) + "\n"


def percentages(lines: Lines, score: str) -> list[float]:
    """A score of each line; lines of before it was measured leave it empty."""
    return [100 * float(line[score]) for line in lines if line.get(score)]


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def draw_table(name: str, rows: tuple[str, ...], lines: Lines, file: Path) -> None:
    """A picture: every seed a dot and the mean a line, left all held-out facts, right by the picture's area."""
    from matplotlib.figure import Figure

    present = [row for row in rows if any(line["row"] == row for line in lines)]
    if not present:
        return
    figure = Figure(figsize=(10, 0.42 * len(present) + 1.6), layout="constrained")
    dots, areas = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, row in enumerate(present):
        of_row = [line for line in lines if line["row"] == row]
        facts = percentages(of_row, "facts")
        dots.plot(facts, [place] * len(facts), "o", color=f"C{place % 10}", alpha=0.6)
        dots.plot([statistics.mean(facts)] * 2, [place - 0.3, place + 0.3], color=f"C{place % 10}", linewidth=2)
        means = [statistics.mean(values) for area in SIZES if (values := percentages(of_row, area))]
        if len(means) == len(SIZES):
            areas.plot(list(SIZES), means, marker="o", color=f"C{place % 10}")
    dots.set_yticks(range(len(present)), present)
    dots.invert_yaxis()
    dots.set_xlabel("held-out caption facts, %")
    areas.set_xlabel("area beside that of pre-training")
    areas.set_ylabel("facts, %")
    figure.suptitle(name)
    figure.savefig(file, dpi=90)


def paired_lines(pairs: tuple[tuple[str, str], ...], seeds: list[int], steps: dict[str, int], work: Path) -> list[str]:
    """Who is right on the same pictures, pooled over the seeds that both rows have run here; a line for each pair."""
    found = []
    for pair in pairs:
        files = [[captions_of(Unit(ROWS[row], seed, steps), work) for row in pair] for seed in seeds]
        both = [(seed, a, b) for seed, (a, b) in zip(seeds, files, strict=True) if a.exists() and b.exists()]
        if both:
            rows_a, rows_b = (
                [row | {"id": f"{seed}/{row['id']}"} for seed, *runs in both for row in read_rows(runs[side])]
                for side in (0, 1)
            )
            result = compare(rows_a, rows_b)
            found.append(
                f"{pair[1]} against {pair[0]}, {len(both)} seed(s), {result.num_scored} facts: "
                f"{100 * result.accuracy_b:.1f} % against {100 * result.accuracy_a:.1f} %; right in one alone "
                f"{result.only_b} : {result.only_a}, McNemar p = {result.mcnemar_p:.2g}; better on pictures "
                f"{result.images_b} : {result.images_a}, sign test p = {result.sign_p:.2g}\n"
            )
    return found
