"""Font faces of the pictures: TrueType files of the matplotlib package, in training and held-out faces."""

import functools
import importlib.util
from pathlib import Path

from PIL import ImageFont

TRAIN_FACES = (
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmb10",
    "cmr10",
    "cmtt10",
)
HELDOUT_FACES = (
    "DejaVuSans-Bold",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-BoldItalic",
    "STIXGeneralBol",
    "cmss10",
)
# Faces that look smaller than DejaVu at the same nominal size.
_SMALL_PREFIXES = ("STIX", "cm")
_SMALL_SCALE = 1.2


@functools.cache
def fonts_folder() -> Path:
    """The folder of matplotlib's TrueType files, found without importing matplotlib.

    Raises:
        ValueError: matplotlib is not installed.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("matplotlib is not installed; it brings the fonts: pip install 'llava-comp[playground]'")
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


@functools.cache
def load_font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """The face with letters about as high as DejaVu's at `size` px per em."""
    scale = _SMALL_SCALE if face.startswith(_SMALL_PREFIXES) else 1.0
    return ImageFont.truetype(str(fonts_folder() / f"{face}.ttf"), round(size * scale))
