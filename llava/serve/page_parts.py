"""Pieces of the web page that are HTML, and its look. Everything that comes from outside is escaped."""

from __future__ import annotations

from collections import Counter
from html import escape

from PIL import Image

from llava.inspection import Inspection, heat_colour
from llava.serve.images import base64_png
from llava.serve.served_model import TokenGrid

CSS = """
.gradio-container {max-width: 1320px !important; width: 100%; margin: 0 auto !important;}
.gradio-container main.contain {width: 100%;}
#title h1 {font-size: 1.35rem; font-weight: 650; letter-spacing: -0.01em; margin: 0;}
#title p {color: var(--body-text-color-subdued); margin: 2px 0 0;}
#bar {align-items: center;}
#chat {height: calc(100vh - 330px) !important; min-height: 380px;}
#chat .example-image-container, #chat .example-image {width: 100%; height: 96px; object-fit: contain;}
#token-count .html-container, #see-count .html-container, #words .html-container, #heat .html-container {padding: 0;}
.card {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 14px;
  background: var(--background-fill-secondary);}
.grids {display: grid; grid-template-columns: minmax(0, 1fr); gap: 6px; font-size: 0.86rem;}
.grids .row {display: flex; justify-content: space-between; gap: 12px;}
.grids .name {color: var(--body-text-color-subdued); overflow: hidden; text-overflow: ellipsis; white-space: nowrap;}
.grids .count {white-space: nowrap; font-variant-numeric: tabular-nums;}
.grids .total {border-top: 1px solid var(--border-color-primary); padding-top: 6px; font-weight: 600;}
.warning {border-color: #dc2626; color: #dc2626; font-size: 0.86rem;}
.soft {color: var(--body-text-color-subdued); font-size: 0.86rem;}
.tokens {overflow-x: auto; border-radius: 10px;}
.tokens .sheet {display: grid; background-size: 100% 100%; border-radius: 10px; overflow: hidden;}
.tokens .cell {display: flex; align-items: flex-end; justify-content: center; padding: 2px; min-width: 0;
  border: 1px solid rgba(127, 127, 127, 0.28);}
.tokens .cell span {font-size: 11.5px; line-height: 1.35; max-width: 100%; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; padding: 0 4px; border-radius: 4px; background: rgba(255, 255, 255, 0.88); color: #18181b;}
.tokens .cell span.asked {background: #fef08a;}
.tokens .heat {align-items: center;}
.tokens .heat span {background: none; font-variant-numeric: tabular-nums;}
.scale {display: flex; align-items: center; gap: 8px; margin: 8px 0 0; font-size: 0.82rem;}
.scale i {flex: 0 0 160px; height: 10px; border-radius: 5px;}
#chat button[aria-label="Share"] {display: none;}  /* it would send the picture to a web site */
footer {display: none !important;}
@media (max-width: 640px) {
  #chat {height: 58vh !important;}
  .tokens .cell span {font-size: 10px; padding: 0 2px;}
}
"""

TIMES = "&times;"
CELL = (44, 96)  # narrowest and widest cell of the words' grid, in pixels
SHEET_HEIGHT = 720  # that a tall image fits on a screen, where its cells are not too narrow then


def token_count(names: list[str], sizes: list[tuple[int, int]], grids: list[TokenGrid]) -> str:
    """What the images become: a row for each: `photo.png, 15 by 20, 300 visual tokens`."""
    if not grids:
        return '<div class="card soft">No image yet. Its grid of visual tokens will stand here.</div>'
    rows = [
        f'<div class="name">{escape(name)}</div><div class="row"><span>{width} {TIMES} {height} px</span>'
        f'<span class="count">{_grid(grid)}</span></div>'
        for name, (width, height), grid in zip(names, sizes, grids, strict=True)
    ]
    total = sum(grid.tokens for grid in grids)
    rows.append(f'<div class="row total"><span>together</span><span class="count">{total} visual tokens</span></div>')
    return f'<div class="card grids">{"".join(rows)}</div>'


def warning(text: str) -> str:
    """What is wrong, in the place of the count."""
    return f'<div class="card warning">{escape(text)}</div>'


def _grid(grid: TokenGrid) -> str:
    return f"{grid.tokens}" if grid.rows is None else f"{grid.rows} {TIMES} {grid.columns} = {grid.tokens}"


def word_figure(found: Inspection, asked: str | None) -> str:
    """The image under a grid of its tokens, each with its nearest word; the others show where the mouse rests."""
    cells = []
    for nearest in (cell for line in found.words.words for cell in line):
        title = escape(", ".join(f"{word} {cosine:.2f}" for word, cosine in nearest))
        style = ' class="asked"' if asked in [word for word, _ in nearest] else ""
        cells.append(f'<div class="cell" title="{title}"><span{style}>{escape(nearest[0][0])}</span></div>')
    return _sheet(found, found.seen, cells)


def heat_figure(found: Inspection, asked: str) -> str:
    """The image in grey under each token's cosine with a word."""
    values = [value for line in found.words.cosines for value in line]
    low, high = min(values), max(values)
    cells = []
    for value in values:
        colour = heat_colour(value, low, high)
        ink = "#18181b" if sum(colour) > 380 else "#fafafa"
        ground = f"rgba({colour[0]},{colour[1]},{colour[2]},0.75)"
        cells.append(
            f'<div class="cell heat" style="background:{ground}"><span style="color:{ink}">{value:.2f}</span></div>'
        )
    stops = ",".join("rgb({},{},{})".format(*heat_colour(step, 0, 5)) for step in range(6))
    scale = (
        f'<div class="scale"><span>{low:.2f}</span><i style="background:linear-gradient(90deg,{stops})"></i>'
        f"<span>{high:.2f}</span><span>cosine with “{escape(asked)}”</span></div>"
    )
    return _sheet(found, found.seen.convert("L"), cells) + scale


def _sheet(found: Inspection, image: Image.Image, cells: list[str]) -> str:
    rows, columns = found.words.rows, found.words.columns
    widest = max(CELL[0], min(CELL[1], SHEET_HEIGHT // rows)) * columns
    style = (
        f"grid-template-columns:repeat({columns},1fr);aspect-ratio:{columns}/{rows};"
        f"min-width:{CELL[0] * columns}px;max-width:{widest}px;"
        f"background-image:url(data:image/png;base64,{base64_png(image)})"
    )
    return f'<div class="tokens"><div class="sheet" style="{style}">{"".join(cells)}</div></div>'


def words_by_number(found: Inspection) -> list[str]:
    """The nearest words, those of most tokens first."""
    nearest = Counter(cell[0][0] for line in found.words.words for cell in line)
    return [word for word, _ in nearest.most_common()]


def nearest_word(found: Inspection) -> str:
    """The word that some token stands nearest to of all."""
    return max((cell[0] for line in found.words.words for cell in line), key=lambda pair: pair[1])[0]


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """A small picture of features with hard edges, about `side` pixels large."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
