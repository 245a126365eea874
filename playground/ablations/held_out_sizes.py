"""Held-out pictures by size: from half to four times the area that the tower was pre-trained at (128×128 px).

None of these sizes occurs in the training list. The data set's own held-out pictures, beside which they are drawn, have
one to eight times that area.
"""

import json
from pathlib import Path

from playground.generate import COMPOSERS, make_picture
from playground.records import heldout_caption_record
from playground.splits import HELDOUT

# Area as a multiple of 128×128 px -> sizes; a document has no place below 128 px of width.
SIZES = {
    "x0.5": ((128, 64),),
    "x1": ((160, 96),),
    "x2": ((224, 160), (160, 224)),
    "x4": ((256, 256), (384, 160), (160, 384)),
}
PER_AREA = 60
_SEED = 1  # not the data set's: other pictures
_FILE = "heldout_sizes.json"  # LLaVA JSON of caption records; `kind` is the area's name


def draw(folder: Path, per_area: int = PER_AREA) -> Path:
    """Draw the pictures into the data set's `folder`, unless they are there; returns their list."""
    file = folder / _FILE
    if file.exists():
        return file
    records = []
    for area, sizes in SIZES.items():
        for number in range(per_area):
            picture = make_picture(HELDOUT, _SEED, number, sizes[number // len(COMPOSERS) % len(sizes)])
            name = f"sizes-{area}-{number:03d}"
            picture.image.save(folder / f"images/{name}.png")
            record = heldout_caption_record(name, f"images/{name}.png", picture)
            records.append(record | {"kind": area})
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(records, indent=1))
    partial.rename(file)
    return file
