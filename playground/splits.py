"""What belongs to the training split and what is held out: fonts, tables, sizes and contents."""

import zlib
from dataclasses import dataclass

from playground import fonts, sizes, tables

# One content in five is held out, chosen by a hash of the content itself: the two splits cannot share one,
# however many samples are drawn and whoever draws them (the data set or the pre-training stream).
_HELDOUT_SHARE = 5


@dataclass(frozen=True)
class Split:
    """One side of the split.

    Attributes:
        name: "train" or "heldout"; part of every sample's random seed.
        faces: fonts that may be used.
        columns: table columns that charts may be drawn from.
        sizes: image sizes (width, height) in px.
    """

    name: str
    faces: tuple[str, ...]
    columns: tuple[tables.Column, ...]
    sizes: tuple[tuple[int, int], ...]

    def owns(self, facts: list[str]) -> bool:
        """Whether a picture of these facts, whatever their order, belongs to this split."""
        content = "; ".join(sorted(facts))
        return (zlib.crc32(content.encode()) % _HELDOUT_SHARE == 0) == (self.name == "heldout")


TRAIN = Split("train", fonts.TRAIN_FACES, tables.TRAIN_COLUMNS, sizes.TRAIN_SIZES)
HELDOUT = Split("heldout", fonts.HELDOUT_FACES, tables.HELDOUT_COLUMNS, sizes.HELDOUT_SIZES)
