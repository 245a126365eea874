"""Look at every record of a mixture before the GPUs do: `python -m llava.data.validate mix.yaml --image_folder DIR`.

What it calls bad is what training would skip, since it asks training's own data set for every sample; only patches are
not made. With --tokenizer, samples whose first answer may end beyond --model_max_length are found too: every image is
counted with the most visual tokens that one may have.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from llava.conversation import conv_templates
from llava.data.bad_samples import BadSample
from llava.data.dataset import LLaVADataset
from llava.data.mixture import load_records
from llava.data.sources import KINDS
from llava.utils import mistakes_in_one_line, positive_int, write_text

RECORDS_AT_A_TIME = 64
EXAMPLES = 3  # of each kind in the table; the report has all


def main(argv: list[str] | None = None) -> None:
    """The command. Exits with 1 where more samples are bad than --max_bad_samples allows, or on a mistake."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    args = make_parser().parse_args(argv)
    with mistakes_in_one_line():
        report = validate(args)
        if args.report:
            write_text(Path(args.report), json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        show(report)
        if report["share"] > args.max_bad_samples:
            raise ValueError(
                f"{report['bad']} of {report['records']} samples are bad, more than --max_bad_samples "
                f"{args.max_bad_samples:g} allows. Training with this rate would abort."
            )


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Every sample is asked for; returns the report."""
    if not 0 <= args.max_bad_samples <= 1:
        raise ValueError(f"--max_bad_samples {args.max_bad_samples}: expected a share between 0 and 1.")
    records = load_records(args.data_path, seed=args.seed)
    dataset = LLaVADataset(
        records,
        tokenizer=load_tokenizer(args.tokenizer) if args.tokenizer else WordCounter(),
        image_processor=SizeReader(args.max_num_vistoken, args.max_image_pixels),
        conversation=conv_templates[args.version],
        image_folder=args.image_folder,
        model_max_length=args.model_max_length if args.tokenizer else sys.maxsize,
        video_frames=args.video_frames,
    )
    bad = list(find_bad(dataset, args.workers))
    return {
        "data_path": str(args.data_path),
        "records": len(records),
        "bad": len(bad),
        "share": len(bad) / len(records),
        "kinds": dict(Counter(sample.kind for _, sample in bad).most_common()),
        "arguments": {name: value for name, value in vars(args).items() if value is not None},
        "bad_samples": [
            {"index": index, "id": sample.id, "kind": sample.kind, "reason": sample.reason} for index, sample in bad
        ],
    }


def find_bad(dataset: LLaVADataset, workers: int) -> Iterator[tuple[int, BadSample]]:
    """Number and reason of every sample that training would skip, in order, under a progress bar."""
    loader = DataLoader(
        _Checks(dataset),
        batch_size=RECORDS_AT_A_TIME,
        num_workers=workers if workers > 1 else 0,
        collate_fn=_those_found,
        worker_init_fn=_one_thread,
    )
    batches = iter(loader)  # forks, which the progress bar's thread should not see
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("looking at samples", total=len(dataset))
        for number, found in enumerate(batches, start=1):
            progress.update(task, completed=min(number * RECORDS_AT_A_TIME, len(dataset)))
            yield from found


class _Checks(Dataset):
    def __init__(self, dataset: LLaVADataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, BadSample] | None:
        sample = self.dataset[index]
        return (index, sample) if isinstance(sample, BadSample) else None


def _those_found(checks: list[tuple[int, BadSample] | None]) -> list[tuple[int, BadSample]]:
    return [check for check in checks if check is not None]


def _one_thread(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


class SizeReader:
    """In the place of a tower's image processor, which `llava.data` does not know: cuts nothing into patches.

    Args:
        max_num_vistoken: Visual tokens that every image is counted with.
        max_image_pixels: Larger images are refused, as the towers' processors do.
    """

    def __init__(self, max_num_vistoken: int, max_image_pixels: int) -> None:
        self.max_num_vistoken = max_num_vistoken
        self.max_image_pixels = max_image_pixels

    def __call__(self, images: list[Image.Image]) -> dict:
        for image in images:
            if image.width * image.height > self.max_image_pixels:
                raise ValueError(
                    f"An image of {image.width}x{image.height} pixels is above the limit of {self.max_image_pixels}."
                )
        return {}

    def num_visual_tokens(self, width: int, height: int) -> int:
        return self.max_num_vistoken


class WordCounter:
    """In the place of a tokenizer, where none was given: a word is a token, and so is a piece of white space alone."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> WordCounter:
        self.input_ids = [0] * max(1, len(text.split())) if text else []
        return self


def load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def show(report: dict[str, Any]) -> None:
    """The report as a table on stdout."""
    title = f"{report['data_path']}: {report['bad']} of {report['records']} samples are bad ({report['share']:.2%})"
    examples = defaultdict(list)
    for sample in report["bad_samples"]:
        examples[sample["kind"]].append(f"{sample['id']}: {sample['reason']}")
    table = Table("what", "samples", "for instance", title=title, title_justify="left")
    for kind, count in report["kinds"].items():
        table.add_row(kind, str(count), "\n".join(examples[kind][:EXAMPLES]))
    console = Console()
    console.print(table if report["kinds"] else title, markup=False)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.data.validate", description=__doc__.splitlines()[0])
    parser.add_argument("data_path", help=f"what --data_path of the training is: a YAML mixture, {KINDS}")
    parser.add_argument("--image_folder", help="folder that records' paths are relative to")
    parser.add_argument("--report", help="JSON file to write: every bad sample with its id and reason")
    parser.add_argument("--max_bad_samples", type=float, default=0.01, help="the training's: share that may be bad")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--version", default="qwen_2_5", choices=sorted(conv_templates), help="the training's template")
    parser.add_argument("--seed", type=int, default=42, help="the training's, of the mixture's draw")
    parser.add_argument("--video_frames", type=positive_int, default=8, help="the training's: frames of a video")
    parser.add_argument(
        "--max_image_pixels", type=positive_int, default=Image.MAX_IMAGE_PIXELS * 2, help="larger images are refused"
    )
    lengths = parser.add_argument_group("lengths")
    lengths.add_argument("--tokenizer", help="folder or hub id of the LLM's; without it no sample is too long")
    lengths.add_argument("--model_max_length", type=positive_int, default=4096, help="the training's")
    lengths.add_argument(
        "--max_num_vistoken", type=positive_int, default=1024, help="visual tokens that every image is counted with"
    )
    return parser


if __name__ == "__main__":
    main()
