"""The picture of `show_alignment`: visual tokens with their nearest words, and a heat map. Pillow alone draws.

Sizes are in pixels of the picture. A cell is one visual token, a square; its size follows from what must be read in it.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Words = Sequence[Sequence[Sequence[tuple[str, float]]]]  # rows, columns, nearest first: (word, cosine)

PANEL = 960  # an image is drawn about so large, if its cells then are of a size between the next two
SMALLEST_CELL, LARGEST_CELL = 72, 160
NARROWEST = 330  # a panel's place, that its caption has room
MARGIN, HEADER = 24, 104
INK, FAINT, PAPER, MARK = (24, 24, 27), (113, 113, 122), (255, 255, 255), (254, 240, 138)
HEAT_STRENGTH = 0.75  # how much of the heat map's colour covers the image


class Lettering:
    """A font at any size; None is the best at hand: DejaVu Sans from matplotlib, else Pillow's own (ASCII)."""

    def __init__(self, file: Path | None = None):
        self.file = file or _dejavu()
        try:
            self.at(12)
        except OSError as error:
            raise ValueError(
                f"{self.file or 'the font'} cannot be read as a font ({error}). Give a .ttf or .otf file: --font FILE."
            ) from error

    @lru_cache  # noqa: B019  one object per run
    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The font, `size` pixels high."""
        return ImageFont.truetype(str(self.file), size) if self.file else ImageFont.load_default(size)

    def fit(self, text: str, size: int, width: float) -> tuple[str, ImageFont.FreeTypeFont]:
        """`text` in letters of `size`, or of 10 at least, or cut short, so that it is no wider than `width`."""
        while size > 10 and self.at(size).getlength(text) > width:
            size -= 1
        font = self.at(size)
        if font.getlength(text) > width:
            while len(text) > 1 and font.getlength(text + "...") > width:
                text = text[:-1]
            text += "..."
        return text, font

    def has(self, text: str) -> bool:
        """Whether there is a glyph for each letter."""
        font = self.at(12)
        box = bytes(font.getmask("\U0010ffff"))  # a code point that no font has
        return all(letter.isspace() or bytes(font.getmask(letter)) != box for letter in text)


def missing_letters(words: Words, lettering: Lettering) -> int:
    """How many different words of the picture the font cannot write."""
    return sum(not lettering.has(word) for word in {word for line in words for cell in line for word, _ in cell})


def draw(
    image: Image.Image,
    words: Words,
    lettering: Lettering,
    *,
    title: str,
    word: str | None = None,
    cosines: Sequence[Sequence[float]] | None = None,
) -> Image.Image:
    """Words on the image, and with `word` and `cosines` the heat map beside it, under a title."""
    rows, columns, top = len(words), len(words[0]), len(words[0][0])
    cell = cell_size(rows, columns, top)
    image = image.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    caption = "nearest word" if top == 1 else f"nearest {top} words"
    panels = [(word_panel(image, words, cell, lettering, word), f"the {caption} of each visual token")]
    if cosines is not None:
        panels.append((heat_panel(image, cosines, cell, lettering), f"cosine of each visual token with “{word}”"))
    slot = max(image.width, NARROWEST) + MARGIN
    width = MARGIN + len(panels) * slot
    scale = max(1.0, width / 2000)  # the title of a large picture is read with the picture as a whole
    header = round(HEADER * scale)
    picture = Image.new("RGB", (width, header + image.height + MARGIN), PAPER)
    brush = ImageDraw.Draw(picture)

    def write(text: str, left: int, top: int, size: int, room: int, ink: tuple[int, int, int] = INK) -> None:
        text, font = lettering.fit(text, round(size * scale), room)
        brush.text((left, round(top * scale)), text, ink, font)

    write(title, MARGIN, 18, 22, width - 2 * MARGIN)
    write(f"{rows} x {columns} = {rows * columns} visual tokens", MARGIN, 48, 15, width - 2 * MARGIN, FAINT)
    for place, (panel, caption) in enumerate(panels):
        left = MARGIN + place * slot
        write(caption, left, HEADER - 28, 16, slot - MARGIN)
        picture.paste(panel, (left, header))
    return picture


def cell_size(rows: int, columns: int, lines: int) -> int:
    """Large enough for `lines` words and a look at the image above them; for a small grid larger."""
    smallest = max(SMALLEST_CELL, lines * 16 + 36)
    return max(smallest, min(LARGEST_CELL, PANEL // max(rows, columns)))


def word_panel(image: Image.Image, words: Words, cell: int, lettering: Lettering, word: str | None) -> Image.Image:
    """A grid on the image, and each token's words at the foot of its cell, the nearest above; `word` is marked."""
    labels = Image.new("RGBA", image.size, (0, 0, 0, 0))
    brush = ImageDraw.Draw(labels)
    for row, line in enumerate(words):
        for column, nearest in enumerate(line):
            left, foot = column * cell, (row + 1) * cell
            right, below = min(left + cell, image.width - 1), min(foot, image.height - 1)
            brush.rectangle((left, foot - cell, right, below), outline=(*FAINT, 110))
            texts = [text for text, _ in nearest]
            _label(brush, texts, (left + cell / 2, foot - 3), cell, lettering, MARK if word in texts else PAPER)
    return Image.alpha_composite(image.convert("RGBA"), labels).convert("RGB")


def _label(
    brush: ImageDraw.ImageDraw,
    texts: list[str],
    foot: tuple[float, float],
    cell: int,
    lettering: Lettering,
    colour: tuple[int, int, int],
) -> None:
    """Lines of text on a pale ground, centred above the point `foot`; the first is the largest and darkest."""
    size = max(13, min(20, cell // 7))
    lines = [lettering.fit(text, size - 2 * (place > 0), cell - 12) for place, text in enumerate(texts)]
    half_width = max(font.getlength(text) for text, font in lines) / 2 + 4
    step = size + 3
    x, y = foot
    box = (x - half_width, y - len(lines) * step, x + half_width, y)
    brush.rounded_rectangle(box, radius=4, fill=(*colour, 225), outline=(*FAINT, 90))
    for place, (text, font) in enumerate(lines):
        height = y - (len(lines) - place - 0.5) * step
        brush.text((x, height), text, INK if place == 0 else FAINT, font, anchor="mm")


def heat_panel(image: Image.Image, cosines: Sequence[Sequence[float]], cell: int, lettering: Lettering) -> Image.Image:
    """The image in grey under one colour per token, dark where its cosine is the lowest, and the figures themselves."""
    from llava.inspection import heat_colour

    low, high = min(map(min, cosines)), max(map(max, cosines))
    colours = Image.new("RGB", (len(cosines[0]), len(cosines)))
    colours.putdata([heat_colour(value, low, high) for line in cosines for value in line])
    panel = Image.blend(
        image.convert("L").convert("RGB"), colours.resize(image.size, Image.Resampling.NEAREST), HEAT_STRENGTH
    )
    brush, font = ImageDraw.Draw(panel), lettering.at(max(12, min(16, cell // 8)))
    for row, line in enumerate(cosines):
        for column, value in enumerate(line):
            ink = INK if sum(heat_colour(value, low, high)) > 380 else PAPER
            brush.text(
                (round((column + 0.5) * cell), round((row + 0.5) * cell)), f"{value:.2f}", ink, font, anchor="mm"
            )
    return panel


def _dejavu() -> Path | None:
    try:
        from matplotlib import get_data_path
    except ImportError:
        return None
    return Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
