"""Scenes with a class for every pixel, in ADE20K's layout: a segmentation task that is drawn in seconds.

python -m playground.scene_masks --output DIR [--training 200] [--validation 50]
"""

import argparse
import random
from pathlib import Path

from playground import scenes, splits
from playground.words import SHAPES

NUM_CLASSES = 1 + len(SHAPES)  # the background and the shapes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m playground.scene_masks", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--training", type=int, default=200)
    parser.add_argument("--validation", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    draw_split(args.output, "training", splits.TRAIN, args.training, args.seed)
    draw_split(args.output, "validation", splits.HELDOUT, args.validation, args.seed)


def draw_split(folder: Path, name: str, split: splits.Split, count: int, seed: int) -> None:
    """`images/NAME/*.png` and `annotations/NAME/*.png`."""
    for kind in ("images", "annotations"):
        (folder / kind / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = random.Random(f"{seed}/{name}/{number}")
        scene = scenes.compose(rng, split, rng.choice(split.sizes))
        image, mask = scene.draw_with_mask(rng)
        image.save(folder / "images" / name / f"{number:05}.png")
        mask.save(folder / "annotations" / name / f"{number:05}.png")


if __name__ == "__main__":
    main()
