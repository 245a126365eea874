"""Draws the embedded data set: `python -m playground.make_data --output DIR`.

DIR/images/*.png|jpg
DIR/stage1.json, stage2.json, stage3.json     LLaVA JSON: simple captions, captions, questions and answers
DIR/stage1.yaml, stage2.yaml, stage3.yaml     the same as mixtures, for --data_path
DIR/heldout_captions.json, heldout_qa.json    the held-out split, one record per caption or question
DIR/settings.json                             written last: its presence means that the folder is complete
"""

import argparse
import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import yaml
from rich.progress import track

from playground.generate import Picture, make_picture
from playground.records import caption_record, heldout_caption_record, heldout_question_records, question_record
from playground.splits import HELDOUT, TRAIN, Split

VERSION = 5
TRAIN_IMAGES, HELDOUT_IMAGES = 12000, 450
# Too hard for the minutes of a run: 30 % right after Stage III, 28 % with blank images.
_NOT_ASKED = ("count",)
_TURNS = {"train": 5, "heldout": 3}
_JPEG_SHARE = 0.2
_CHUNK = 32


def draw_one(number: int, *, split: Split, seed: int, images: Path) -> dict[str, list[dict]]:
    """Draws and saves picture `number`; returns its records by the JSON file that they belong to."""
    picture = make_picture(split, seed, number)
    name = f"{split.name}-{number:06d}"
    file = _save(picture, images, name)
    asked = (question for question in picture.content.questions(picture.rng) if question.kind not in _NOT_ASKED)
    questions = list(islice(asked, _TURNS[split.name]))
    if split == HELDOUT:
        return {
            "heldout_captions": [heldout_caption_record(name, file, picture)],
            "heldout_qa": heldout_question_records(name, file, picture, questions),
        }
    caption = caption_record(name, file, picture)
    if picture.simple:
        return {"stage1": [caption]}
    asking = [question_record(name, file, questions)] if questions else []  # a lone shape raises no question
    return {"stage2": [caption], "stage3": asking}


def _save(picture: Picture, images: Path, name: str) -> str:
    """Saves as PNG or JPEG and returns the path relative to the data folder."""
    if picture.rng.random() < _JPEG_SHARE:
        path = images / f"{name}.jpg"
        picture.image.save(path, quality=90)
    else:
        path = images / f"{name}.png"
        picture.image.save(path, compress_level=3)
    return f"{images.name}/{path.name}"


def make_data(output: Path, *, seed: int, train_images: int, heldout_images: int) -> bool:
    """Draws the data set into `output` unless it is there already.

    Everything is written into a folder beside `output`, which then takes its name, so that no half-made data set
    ever stands there.

    Returns:
        False if a finished data set with the same settings was kept.

    Raises:
        ValueError: `output` is a file, or a folder that this command did not make or made with other settings.
    """
    settings = {"version": VERSION, "seed": seed, "train_images": train_images, "heldout_images": heldout_images}
    if _is_finished(output, settings):
        return False
    work = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(work, ignore_errors=True)
        (work / "images").mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--output {output}: cannot make the folder: {error.strerror}") from error
    files: dict[str, list[dict]] = {}
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for split, count in ((TRAIN, train_images), (HELDOUT, heldout_images)):
            job = partial(draw_one, split=split, seed=seed, images=work / "images")
            results = pool.map(job, range(count), chunksize=_CHUNK)
            for records in track(results, description=f"drawing {split.name} pictures", total=count):
                for file, some in records.items():
                    files.setdefault(file, []).extend(some)
    _write_lists(work, files)
    (work / "settings.json").write_text(json.dumps(settings, indent=1))
    if output.exists():
        output.rmdir()
    work.rename(output)
    return True


def _is_finished(output: Path, settings: dict) -> bool:
    """Whether `output` holds this very data set; refuses anything there that is not ours to replace."""
    if not output.exists():
        return False
    if not output.is_dir():
        raise ValueError(f"--output {output}: is a file; give a folder")
    marker = output / "settings.json"
    if not marker.exists():
        if any(output.iterdir()):
            raise ValueError(f"--output {output}: holds other files; give a new or empty folder")
        return False
    found = json.loads(marker.read_text())
    changes = [f"{name} {found.get(name)}, not {value}" for name, value in settings.items() if found.get(name) != value]
    if changes:
        raise ValueError(
            f"--output {output}: holds a data set of {'; '.join(changes)}. "
            "Delete that folder to have it drawn again, or give another one"
        )
    return True


def _write_lists(work: Path, files: dict[str, list[dict]]) -> None:
    for name, records in files.items():
        (work / f"{name}.json").write_text(json.dumps(records, indent=1))
        if name.startswith("stage"):
            mixture = {"datasets": [{"json_path": f"{name}.json", "sampling_strategy": "all"}]}
            (work / f"{name}.yaml").write_text(yaml.safe_dump(mixture))


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 3 (a picture of each kind)")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"make_data: {message}\n")


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m playground.make_data", description="Draw the embedded data set.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-images", type=_count, default=TRAIN_IMAGES)
    parser.add_argument("--heldout-images", type=_count, default=HELDOUT_IMAGES)
    args = parser.parse_args(argv)
    try:
        made = make_data(
            args.output, seed=args.seed, train_images=args.train_images, heldout_images=args.heldout_images
        )
    except ValueError as error:
        print(f"make_data: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {'data set finished' if made else 'kept, it is finished and has the same settings'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
