"""Three pictures to begin with, drawn here so that the page needs no file and no network."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (24, 24, 27), (255, 255, 255)


def save_examples(folder: Path) -> list[tuple[str, Path]]:
    """Questions and the pictures that they are about."""
    pictures = {"document": _document(), "chart": _chart(), "shapes": _shapes()}
    questions = {
        "document": "What is the city?",
        "chart": "What is the value of green?",
        "shapes": "What is right of the orange square?",
    }
    found = []
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
        found.append((questions[name], folder / f"{name}.png"))
    return found


def _document() -> Image.Image:
    picture = Image.new("RGB", (384, 192), PAPER)
    brush, font = ImageDraw.Draw(picture), ImageFont.load_default(30)
    for place, line in enumerate(("name: Anna", "city: Cork", "pet: cow")):
        brush.text((28, 24 + 50 * place), line, INK, font)
    return picture


def _chart() -> Image.Image:
    picture = Image.new("RGB", (320, 320), PAPER)
    brush, font = ImageDraw.Draw(picture), ImageFont.load_default(22)
    bars = (("red", 50, (214, 40, 40)), ("green", 70, (34, 139, 34)), ("orange", 30, (245, 140, 20)))
    for place, (_, value, colour) in enumerate(bars):
        left, top = 36 + 92 * place, 270 - 3 * value
        brush.rectangle((left, top, left + 60, 270), fill=colour)
        brush.text((left + 30, top - 4), str(value), INK, font, anchor="mb")
    brush.line((20, 270, 304, 270), INK, 3)
    return picture


def _shapes() -> Image.Image:
    picture = Image.new("RGB", (384, 192), PAPER)
    brush = ImageDraw.Draw(picture)
    brush.rectangle((40, 52, 128, 140), fill=(245, 140, 20))
    brush.ellipse((232, 52, 320, 140), fill=(40, 90, 220))
    return picture
