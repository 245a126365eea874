"""Charts as inline SVG and HTML, coloured by the page's style sheet (`page_style`): no script, no library.

Lengths are in SVG user units; a chart scales with its column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from llava.eval.history import StageHistory
from llava.eval.results import STAGE_TITLES
from llava.eval.text_table import percent

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 26, 26  # margins for the axes' labels and the stages' names
_LETTER = 7  # width of a letter, to see what fits


def loss_chart(name: str, histories: Sequence[StageHistory]) -> str:
    """One named value over the steps of all stages, one after the other; a stage without it stays empty."""
    total = sum(history.steps for history in histories)
    values = [value for history in histories for _, value in history.curves.get(name, [])]
    finite = [value for value in values if math.isfinite(value)]
    if not finite or not total:
        return ""
    ticks = nice_ticks(min(finite), max(finite))
    low, high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / total

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    ]
    start = 0
    for history in histories:
        parts.append(_stage(history, name, start, x, y))
        start += history.steps
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{total} steps</text>')
    first, last = finite[0], finite[-1]
    return (
        f'<figure class="chart"><figcaption><code>{escape(name)}</code> '
        f"<span>{first:.3g} → {last:.3g}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)} over the steps of the run">'
        f"{''.join(parts)}</svg></figure>"
    )


def _stage(history: StageHistory, name: str, start: int, x, y) -> str:
    """A stage's border, its name where there is room, and its piece of the curve."""
    left, right = x(start), x(start + history.steps)
    title = STAGE_TITLES[history.stage]
    parts = [f'<line class="border" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}"/>']
    if len(title) * _LETTER + 6 <= right - left:
        parts.append(f'<text class="stage" x="{left + 5:.1f}" y="{TOP - 10}">{escape(title)}</text>')
    points = [
        (x(start + step), y(value), step, value) for step, value in history.curves.get(name, []) if _finite(value)
    ]
    if points:
        parts.append(f'<polyline class="curve" points="{" ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)}"/>')
    for px, py, step, value in points:
        parts.append(
            f'<circle class="point" cx="{px:.1f}" cy="{py:.1f}" r="4">'
            f"<title>{escape(title)}, step {step}: {value:.4g}</title></circle>"
        )
    return "".join(parts)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that enclose [low, high]; from zero where that wastes little."""
    low = 0.0 if 0 < low < 0.6 * high else low
    span = (high - low) or abs(high) or 1.0
    magnitude = 10 ** math.floor(math.log10(span / count))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if span / (factor * magnitude) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def bar_chart(groups: Sequence[tuple[str, Sequence[tuple[str, str, float | None]]]]) -> str:
    """Horizontal bars of shares in groups: (group, [(bar's name, style class, share 0...1 or None), ...])."""
    parts = []
    for title, bars in groups:
        rows = "".join(
            f'<div class="bar"><span class="name">{escape(name)}</span><span class="track">'
            f'<span class="fill {style}" style="width:{100 * share:.1f}%"></span></span>'
            f'<span class="value">{percent(share)}</span></div>'
            for name, style, share in bars
            if share is not None
        )
        if rows:
            parts.append(f'<div class="bars"><h4>{escape(title)}</h4>{rows}</div>')
    return f'<div class="barchart">{"".join(parts)}</div>' if parts else ""


def _finite(value: float) -> bool:
    return math.isfinite(value)
