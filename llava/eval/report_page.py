"""The sections of report.html: which figures, which images, which words."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from html import escape
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from llava.eval import page
from llava.eval.charts import bar_chart, loss_chart
from llava.eval.history import loss_names, reported_names
from llava.eval.models import load_checkpoint
from llava.eval.paired import describe
from llava.eval.results import BLANK, CAPTIONS, QUESTIONS, RANDOM_TOWER, STAGE_TITLES, STAGES, UNTRAINED
from llava.eval.run_results import RunResults, kind_table, stage_table
from llava.eval.scoring import Row, accuracy, accuracy_by, is_large
from llava.eval.text_table import percent
from llava.inspection import vocabulary, word_map
from llava.mm_utils import load_image

logger = logging.getLogger(__name__)

NUM_ANSWERS, NUM_WORD_MAPS = 12, 4
# The alignment loss is on up to II; Stage III trains without it.
WORD_MAP_STAGES = ("stage2_native", "stage2_fixed", "stage1", "stage3_sft")


def report_page(results: RunResults, folder: Path, word_maps: list[str]) -> str:
    """The whole page; `folder` holds the held-out images, `word_maps` are `word_map_figures`."""
    title = f"CoMP: {results.run.resolve().name}"
    names = loss_names(results.histories) + reported_names(results.histories)
    body = [
        f"<h1>{escape(title)}</h1>",
        page.tiles(headline_figures(results)),
        page.section(
            "Stages",
            "First and last logged value of each loss; scores on held-out data.",
            page.table(*stage_table(results)),
        ),
        page.section(
            "Losses",
            "Every named value over the steps of all stages, one stage after the other.",
            page.grid("charts", [loss_chart(name, results.histories) for name in names]),
        ),
        page.section(
            "Held-out questions",
            "Exact match. With blank images a model can only guess from the question.",
            bar_chart(question_groups(results)),
            page.table(*kind_table(results)),
        ),
        page.section(
            "Held-out captions",
            "Share of an image's facts that stand in its caption verbatim. "
            f"Large: not square, and above 1.5 times the area of {results.fixed_size} x {results.fixed_size} pixels.",
            bar_chart(caption_groups(results)),
            paired_test(results),
        ),
        page.section(
            "Answers",
            "A dozen held-out images, chosen by a hash of their ids and not by their results.",
            page.grid("cards", list(answer_cards(results, folder))),
        ),
        page.section(
            "Words that visual tokens align to",
            "On each visual token the word of the LLM's vocabulary that is nearest to it by cosine, after the adapter; "
            "hover for five. Words of the image's true caption, which stands above it, are blue.",
            page.grid("wordmaps", word_maps),
        ),
        "<footer>Made by <code>python -m llava.eval.report</code>.</footer>",
    ]
    return page.document(title, body)


def paired_test(results: RunResults) -> str:
    """II native against II fixed on the large images, in words."""
    comparison = results.native_against_fixed()
    if comparison is None:
        return ""
    lines = ["Large images, A = II fixed, B = II native:", *describe(comparison).splitlines()]
    return f"<p><code>{'<br>'.join(map(escape, lines))}</code></p>"


def headline_figures(results: RunResults) -> list[tuple[str, str]]:
    """The few numbers that say whether it worked; only those that were measured."""
    last = results.last_stage(QUESTIONS)
    measured = []
    if last is not None:
        title = STAGE_TITLES[last] if last == UNTRAINED else f"after {STAGE_TITLES[last]}"
        measured += [
            (results.get(QUESTIONS, last), f"exact match {title}, n = {len(results.get(QUESTIONS, last))}"),
            (results.get(QUESTIONS, last, BLANK), "the same with blank images"),
            (results.get(QUESTIONS, last, RANDOM_TOWER), "the same with a randomised tower"),
        ]
    figures = [(percent(accuracy(rows)["accuracy"]), name) for rows, name in measured if rows]
    comparison = results.native_against_fixed()
    if comparison is not None:
        figures.append(
            (f"{100 * comparison.difference:+.1f} points", "caption facts of large images, II native against II fixed")
        )
    return figures


def question_groups(results: RunResults) -> list[tuple[str, list[tuple[str, str, float | None]]]]:
    """Bars: all questions stage by stage, then each kind after the last stage beside its controls."""
    last = results.last_stage(QUESTIONS)
    if last is None:
        return []
    stages = [
        (STAGE_TITLES[stage], "before" if stage == UNTRAINED else "", results.get(QUESTIONS, stage))
        for stage in (UNTRAINED, *STAGES)
    ]
    controls = [
        (STAGE_TITLES[last], "", results.get(QUESTIONS, last)),
        (STAGE_TITLES[UNTRAINED], "before", results.get(QUESTIONS, UNTRAINED) if last != UNTRAINED else []),
        ("blank images", "blank", results.get(QUESTIONS, last, BLANK)),
        ("random tower", "random", results.get(QUESTIONS, last, RANDOM_TOWER)),
    ]
    groups = [("all kinds", [*_bars(stages), *_bars(controls[2:])])]
    for kind in accuracy_by(results.get(QUESTIONS, last), lambda row: row["kind"]):
        of_kind = [(name, style, [row for row in rows if row["kind"] == kind]) for name, style, rows in controls]
        groups.append((kind, _bars(of_kind)))
    return groups


def caption_groups(results: RunResults) -> list[tuple[str, list[tuple[str, str, float | None]]]]:
    """Bars: all captions, the large images, and each kind, stage by stage."""
    stages = [(stage, results.get(CAPTIONS, stage)) for stage in (UNTRAINED, *STAGES)]
    kinds = sorted({row["kind"] for _, rows in stages for row in rows})
    subsets = [("all images", lambda row: True), ("large images", lambda row: is_large(row, results.fixed_size))]
    subsets += [(kind, lambda row, kind=kind: row["kind"] == kind) for kind in kinds]
    return [
        (
            title,
            _bars(
                [
                    (STAGE_TITLES[stage], "before" if stage == UNTRAINED else "", [row for row in rows if belongs(row)])
                    for stage, rows in stages
                ]
            ),
        )
        for title, belongs in subsets
    ]


def _bars(measured: list[tuple[str, str, list[Row]]]) -> list[tuple[str, str, float | None]]:
    return [(name, style, accuracy(rows)["accuracy"]) for name, style, rows in measured]


def answer_cards(results: RunResults, folder: Path) -> Iterator[str]:
    """Answers of the last stage, the kinds in turn."""
    last = results.last_stage(QUESTIONS)
    for row in pick(results.get(QUESTIONS, last) if last else [], NUM_ANSWERS):
        image = _image(folder, row)
        if image is not None:
            yield page.answer_card(row, image)


def word_map_figures(results: RunResults, folder: Path, device: str | None) -> Iterator[str]:
    """Maps for a few held-out captions (or questions), by the last stage that was trained to align."""
    stage = next((stage for stage in WORD_MAP_STAGES if (results.run / stage / "config.json").is_file()), None)
    task = next((task for task in (CAPTIONS, QUESTIONS) if results.last_stage(task)), None)
    if stage is None or task is None:
        return
    rows = results.get(task, results.last_stage(task))
    images = [(row, _image(folder, row)) for row in pick(rows, NUM_WORD_MAPS)]
    if not any(image for _, image in images):
        return
    loaded = load_checkpoint(str(results.run / stage), device=device)
    words = vocabulary(loaded.tokenizer)
    for row, image in images:
        if image is not None:
            found = word_map(loaded.model, loaded.image_processor, image, words)
            yield page.word_map_figure(image, found, row["answer"])


def pick(rows: list[Row], count: int) -> list[Row]:
    """`count` rows of different images, the kinds in turn, in an order that their scores have no part in."""
    shuffled = sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    one_per_image = list({row["image"]: row for row in reversed(shuffled)}.values())[::-1]
    kinds = sorted({row["kind"] for row in one_per_image})
    turns = zip_longest(*([row for row in one_per_image if row["kind"] == kind] for kind in kinds))
    return [row for turn in turns for row in turn if row is not None][:count]


def _image(folder: Path, row: Row) -> Image.Image | None:
    try:
        return load_image(folder / row["image"])
    except (OSError, ValueError) as error:
        logger.warning("left out of the report: %s", error)
        return None
