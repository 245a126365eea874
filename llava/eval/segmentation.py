"""Semantic segmentation on a frozen tower (paper, Tab. 3b and 14): UperNet, mean IoU and pixel accuracy.

    python -m llava.eval.segmentation --tower comp-siglip:runs/comp_1b_siglip/stage2_native --data ADE20K \\
        --size 504 --output results/comp_siglip_504
    torchrun --nproc_per_node 8 -m llava.eval.segmentation ...            # several GPUs; --batch_size stays global

ADE20K holds images/{training,validation} and annotations/{training,validation}. The same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from llava.eval.measurement import make_measurement, write_measurement
from llava.eval.probes.augment import BICUBIC
from llava.eval.probes.command import add_probe_flags, command_line, entry_point, loader_options, make_progress
from llava.eval.probes.frozen import FrozenTower, prepare
from llava.eval.probes.masked_images import IGNORED, MaskedCrops, Masks, WholeImages, collate
from llava.eval.probes.stream import TrainingSteps, evaluation_batches
from llava.eval.probes.training import Place, Protocol, train
from llava.eval.probes.upernet import UperNetProbe, pyramid_layers, resized, windows
from llava.utils import positive_int

logger = logging.getLogger(__name__)

SIZES = (504, 672)  # Tab. 14's columns
STEPS, WARMUP_STEPS, BATCH_SIZE = 80_000, 1500, 16
LEARNING_RATE = 1e-4  # OURS: the table's is lost in our copy of the paper.
ADE20K_CLASSES = 150


def protocol(size: int, *, steps: int = STEPS, batch_size: int | None = None, learning_rate: float | None = None):
    """Tab. 14 at a size; fewer steps warm up in proportion."""
    return Protocol(
        size=size,
        steps=steps,
        warmup_steps=round(WARMUP_STEPS * steps / STEPS),
        batch_size=batch_size or BATCH_SIZE,
        learning_rate=learning_rate or LEARNING_RATE,
        decay="poly",
    )


def run(args: argparse.Namespace, place: Place) -> dict[str, Any]:
    """Train the head, score it on the validation images, write the measurement."""
    tower = FrozenTower.load(args.tower, place.device, args.torch_dtype, **args.tower_options)
    training, validation = (Masks.open(args.data, split, args.num_classes) for split in ("training", "validation"))
    plan = protocol(args.size, steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate)
    torch.manual_seed(args.seed)
    head = UperNetProbe(tower.width, args.num_classes, args.hidden_size).to(place.device)
    segmenter = Segmenter(tower, head, plan.size)
    crops = MaskedCrops(training, tower.processor, plan.size, args.seed)
    steps = {"batch_size": plan.batch_size, "steps": plan.steps, "micro_batch": args.micro_batch, "seed": args.seed}
    steps |= {"rank": place.rank, "world": place.world}
    train(
        head,
        lambda done: DataLoader(
            crops,
            batch_sampler=TrainingSteps(len(crops), start=done, **steps),
            collate_fn=collate,
            **loader_options(args, place),
        ),
        lambda batch: (segmenter.maps(batch[0], batch[1]), batch[2].to(place.device)),
        protocol=plan,
        accumulation=TrainingSteps(len(crops), **steps).accumulation,
        progress=make_progress(args, plan, samples=len(crops)),
        place=place,
    )
    scores = evaluate(segmenter, validation, args, place)
    measurement = make_measurement(
        args.label or args.tower,
        {f"segmentation_{args.size}": scores["miou"], f"segmentation_{args.size}_accuracy": scores["accuracy"]},
        rows=args.row,
        command=command_line("llava.eval.segmentation", args.argv),
        details={
            "task": "segmentation",
            "data": args.data,
            "protocol": asdict(plan),
            "inference": args.inference,
            "images": len(validation),
        },
    )
    if place.rank == 0:
        write_measurement(Path(args.output) / "results.json", measurement)
    return measurement


@dataclass(frozen=True)
class Segmenter:
    """A frozen tower with its head, for squares of one size and for whole images."""

    tower: FrozenTower
    head: UperNetProbe
    size: int

    def maps(self, pixels: Tensor, grids: Sequence[Sequence[int]]) -> list[Tensor]:
        """What the head reads of squares: (B, D, rows, cols) of four layers."""
        layers = pyramid_layers(self.tower.tower.num_layers)
        found = dict(zip(sorted(set(layers)), self.tower.maps(pixels, grids, sorted(set(layers))), strict=True))
        return [found[layer] for layer in layers]

    def whole(self, image: Image.Image) -> Tensor:
        """(classes, height, width) of an image squashed to the square."""
        return self._squares([image.resize((self.size, self.size), BICUBIC)], (image.height, image.width))[0]

    def sliding(self, image: Image.Image) -> Tensor:
        """(classes, height, width): the short side becomes the size, squares two thirds of it apart, their mean."""
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        large = image.resize((width, height), BICUBIC)
        total, counts = 0, torch.zeros(1, height, width, device=self.tower.device)
        for left, top in windows(width, height, self.size, max(1, self.size * 2 // 3)):
            square = large.crop((left, top, left + self.size, top + self.size))
            logits = self._squares([square], (self.size, self.size))[0]
            if isinstance(total, int):
                total = logits.new_zeros(len(logits), height, width)
            total[:, top : top + self.size, left : left + self.size] += logits
            counts[:, top : top + self.size, left : left + self.size] += 1
        return resized((total / counts)[None], (image.height, image.width))[0]

    def _squares(self, images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        pixels, grids = zip(*(prepare(self.tower.processor, image) for image in images), strict=True)
        return self.head.logits(self.maps(torch.cat(pixels), grids), size)


@torch.inference_mode()
def evaluate(segmenter: Segmenter, validation: Masks, args: argparse.Namespace, place: Place) -> dict[str, float]:
    """Percent: the mean over classes of intersection over union, and of pixels that are right; over all processes."""
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    segmenter.head.eval()
    predict = segmenter.whole if args.inference == "whole" else segmenter.sliding
    miou = MulticlassJaccardIndex(args.num_classes, ignore_index=IGNORED).to(place.device)
    accuracy = MulticlassAccuracy(args.num_classes, ignore_index=IGNORED, average="micro").to(place.device)
    batches = evaluation_batches(len(validation), 1, place.rank, place.world)
    images = DataLoader(
        WholeImages(validation),
        batch_sampler=batches,
        collate_fn=_only,
        **loader_options(args, place),
    )
    for image, target in images:
        predicted = predict(image).argmax(0)
        for metric in (miou, accuracy):
            metric.update(predicted[None], target[None].to(place.device))
    return {"miou": round(100 * miou.compute().item(), 3), "accuracy": round(100 * accuracy.compute().item(), 3)}


def _only(samples: Sequence[tuple[Image.Image, Tensor]]) -> tuple[Image.Image, Tensor]:
    """Of a batch of one."""
    (sample,) = samples
    return sample


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.segmentation", description=__doc__.splitlines()[0])
    add_probe_flags(parser, sizes=SIZES)
    parser.add_argument("--steps", type=positive_int, default=STEPS, help="of training")
    parser.add_argument("--num_classes", type=positive_int, default=ADE20K_CLASSES)
    parser.add_argument("--hidden_size", type=positive_int, default=512, help="of the UperNet head")
    parser.add_argument("--inference", choices=("sliding", "whole"), default="sliding", help="squares, or squashed")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command."""
    entry_point(make_parser(), argv, run)


if __name__ == "__main__":
    main()
