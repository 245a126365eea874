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

    def owns(self, caption: str, facts: list[str]) -> bool:
        """Whether a picture of this content belongs to this split.

        Two hashes must say so, that of the caption and that of its facts in any order; a content on which they disagree
        belongs to no split. The shipped models were pre-trained when only the caption decided: asking for both keeps
        their training captions out of the held-out split, and held-out facts, however ordered, out of all that is
        trained from now on.
        """
        contents = (caption, "; ".join(sorted(facts)))
        return all(_is_heldout(content) == (self.name == "heldout") for content in contents)


def _is_heldout(content: str) -> bool:
    return zlib.crc32(content.encode()) % _HELDOUT_SHARE == 0


TRAIN = Split("train", fonts.TRAIN_FACES, tables.TRAIN_COLUMNS, sizes.TRAIN_SIZES)
HELDOUT = Split("heldout", fonts.HELDOUT_FACES, tables.HELDOUT_COLUMNS, sizes.HELDOUT_SIZES)
