"""Pieces of the report's HTML. Everything that comes from data or a model is escaped here, and nothing is linked."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

from llava.eval.page_style import STYLE
from llava.eval.scoring import Row
from llava.inspection import WordMap

CELL = 56  # side of a visual token in a word map, SVG user units
_FONT, _LETTER = 14, 0.58  # a word map's font size, and a letter's width in font sizes
_LARGEST_SIDE = 448  # pixels of an embedded image


def document(title: str, body: Iterable[str]) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(piece for piece in body if piece)
        + "\n</main></body></html>\n"
    )


def section(title: str, text: str, *pieces: str) -> str:
    """A heading, a sentence, and the pieces; nothing at all where there are no pieces."""
    content = "\n".join(piece for piece in pieces if piece)
    return f"<section><h2>{escape(title)}</h2><p class='soft'>{escape(text)}</p>{content}</section>" if content else ""


def grid(style: str, pieces: Sequence[str]) -> str:
    """Pieces side by side as far as there is room."""
    content = "".join(pieces)
    return f'<div class="{style}">{content}</div>' if content else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where the page is narrow."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """(number, what it is) in large letters."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in figures
        )
        + "</div>"
    )


def answer_card(row: Row, image: Image.Image) -> str:
    """A held-out image with question, answer, prediction and verdict."""
    verdict = '<span class="right">✓ right</span>' if row["correct"] else '<span class="wrong">✗ wrong</span>'
    return (
        f'<article class="card"><img src="{data_uri(image)}" alt="held-out image {escape(row["id"])}">'
        f"<dl><dt>Q</dt><dd>{escape(row['question'])}</dd><dt>answer</dt><dd>{escape(row['answer'])}</dd>"
        f"<dt>model</dt><dd>{escape(row['prediction']) or '<i>nothing</i>'}</dd></dl>"
        f'<div class="verdict">{verdict}<span class="soft">{escape(row["kind"])}, '
        f"{row['width']}&times;{row['height']}</span></div></article>"
    )


def word_map_figure(image: Image.Image, words: WordMap, caption: str) -> str:
    """The image under a grid of the words nearest to its visual tokens; those of `caption` stand out."""
    width, height = words.columns * CELL, words.rows * CELL
    named = set(caption.casefold().replace(";", " ").replace(",", " ").replace(":", " ").replace(".", " ").split())
    cells = [
        _cell(row, column, nearest, named)
        for row, line in enumerate(words.words)
        for column, nearest in enumerate(line)
    ]
    return (
        f'<figure class="words" style="--full:{width}px"><figcaption>{escape(caption)}</figcaption><div class="scroll">'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="words nearest to each visual token" '
        f'style="width:100%;min-width:{round(0.7 * width)}px">'
        f'<image href="{data_uri(image)}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f"{''.join(cells)}</svg></div></figure>"
    )


def _cell(row: int, column: int, nearest: Sequence[tuple[str, float]], named: set[str]) -> str:
    word = nearest[0][0]
    size = min(_FONT, (CELL - 6) / (_LETTER * len(word)))
    style = "word named" if word.casefold() in named else "word"
    list_of_words = ", ".join(f"{text} {cosine:.2f}" for text, cosine in nearest)
    x, y = column * CELL, row * CELL
    return (
        f'<g><title>{escape(list_of_words)}</title><rect class="cell" x="{x}" y="{y}" width="{CELL}" height="{CELL}"/>'
        f'<text class="{style}" style="font-size:{size:.1f}px" x="{x + CELL // 2}" y="{y + CELL // 2 + 5}">'
        f"{escape(word)}</text></g>"
    )


def data_uri(image: Image.Image) -> str:
    """The image inside the page, as PNG or JPEG, whichever is smaller."""
    image = image.convert("RGB")
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    encodings = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encodings.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, content = min(encodings)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
