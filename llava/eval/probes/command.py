"""The flags that both probes take, and what follows from them."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llava.eval.measurement import add_row_flags
from llava.eval.probes.frozen import add_tower_flags, tower_options
from llava.eval.probes.training import Place, Progress, Protocol
from llava.utils import mistakes_in_one_line, positive_int

# Flags that may change between two starts of one run: where and how fast. The rest decides what comes out.
FREE = {"output", "micro_batch", "eval_batch_size", "num_workers", "save_steps", "device", "label", "row"}
COMPUTED = {"argv", "torch_dtype", "tower_options"}


def add_probe_flags(parser: argparse.ArgumentParser, *, sizes: tuple[int, ...]) -> None:
    add_tower_flags(parser)
    parser.add_argument("--data", required=True, help="see above")
    parser.add_argument("--size", type=positive_int, default=sizes[0], help=f"pixels; the paper's: {sizes}")
    parser.add_argument("--output", required=True, help="folder of results.json and the checkpoint")
    parser.add_argument("--batch_size", type=positive_int, help="of all processes; default: the paper's")
    parser.add_argument("--micro_batch", type=positive_int, help="samples of one process at once; default: its share")
    parser.add_argument("--eval_batch_size", type=positive_int, default=32)
    parser.add_argument("--learning_rate", type=float, help="peak; the paper's is not known, docs/evaluation.md")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images, for each GPU")
    parser.add_argument("--save_steps", type=positive_int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: the GPU, or the CPU")
    add_row_flags(parser)


def make_progress(args: argparse.Namespace, plan: Protocol, **more: Any) -> Progress:
    """The run's folder, and all that must stay as it was when the run goes on."""
    kept = {name: value for name, value in vars(args).items() if name not in FREE | COMPUTED}
    settings = json.loads(json.dumps(kept | {"protocol": asdict(plan)} | more))
    return Progress(Path(args.output), settings, args.save_steps)


def loader_options(args: argparse.Namespace, place: Place) -> dict[str, Any]:
    return {"num_workers": args.num_workers, "pin_memory": place.device.type == "cuda"}


def command_line(module: str, argv: list[str]) -> list[str]:
    return ["python", "-m", module, *argv]


def entry_point(
    parser: argparse.ArgumentParser, argv: list[str] | None, run: Callable[[argparse.Namespace, Place], dict[str, Any]]
) -> None:
    """Parse, run, print the scores. A mistake in flags or files is one line on stderr and a failing exit."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.argv = argv
    with mistakes_in_one_line():
        place = Place.find(args.device)
        dtype = args.dtype or ("bfloat16" if place.device.type == "cuda" else "float32")
        args.torch_dtype, args.tower_options = getattr(torch, dtype), tower_options(args)
        measurement = run(args, place)
    place.leave()
    if place.rank == 0:
        sys.stdout.write(json.dumps(measurement["scores"]) + "\n")
