"""Image classification on a frozen tower (paper, Tab. 3a and 13): attentive pooling, top-1 and top-5.

    python -m llava.eval.classification --tower comp-siglip:runs/comp_1b_siglip/stage2_native --data IMAGENET \\
        --size 224 --output results/comp_siglip_224
    torchrun --nproc_per_node 8 -m llava.eval.classification ...          # several GPUs; --batch_size stays global

IMAGENET holds train/CLASS/IMAGE and val/CLASS/IMAGE, or is hf:NAME. The same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from llava.eval.measurement import make_measurement, write_measurement
from llava.eval.probes.attentive_pooling import AttentivePoolingProbe
from llava.eval.probes.command import add_probe_flags, command_line, entry_point, loader_options, make_progress
from llava.eval.probes.frozen import FrozenTower
from llava.eval.probes.labelled_images import LabelledImages, collate, open_split
from llava.eval.probes.stream import TrainingSteps, evaluation_batches
from llava.eval.probes.training import Place, Protocol, train

logger = logging.getLogger(__name__)

EPOCHS, WARMUP_EPOCHS = 10, 1
BATCH_SIZES = {224: 1024, 448: 256}  # Tab. 13's columns
LEARNING_RATE = 1e-3  # for 1024 samples, in proportion for others. OURS: the table's is lost in our copy of the paper.
CENTRAL_SHARE = 0.875  # of the short side, at evaluation. OURS: the paper does not say; 224 of 256 is the custom.


def protocol(size: int, samples: int, *, epochs: int = EPOCHS, batch_size: int | None = None) -> Protocol:
    """Tab. 13 at a size; sizes that it lacks take the batch of the nearest."""
    batch = batch_size or BATCH_SIZES[min(BATCH_SIZES, key=lambda each: abs(each - size))]
    steps = math.ceil(epochs * samples / batch)
    return Protocol(
        size=size,
        steps=steps,
        warmup_steps=round(steps * WARMUP_EPOCHS / EPOCHS),
        batch_size=batch,
        learning_rate=LEARNING_RATE * batch / 1024,
        decay="cosine",
    )


def run(args: argparse.Namespace, place: Place) -> dict[str, Any]:
    """Train the head, score it on the validation images, write the measurement."""
    tower = FrozenTower.load(args.tower, place.device, args.torch_dtype, **args.tower_options)
    sources = {split: open_split(args.data, split) for split in ("train", "val")}
    if sources["train"].classes != sources["val"].classes:
        raise ValueError(f"--data {args.data}: training and validation images have different classes.")
    plan = protocol(args.size, len(sources["train"]), epochs=args.epochs, batch_size=args.batch_size)
    if args.learning_rate:
        plan = replace(plan, learning_rate=args.learning_rate)
    images = {
        split: LabelledImages(source, tower.processor, plan.size, args.central_share, args.seed)
        for split, source in sources.items()
    }
    torch.manual_seed(args.seed)
    head = AttentivePoolingProbe(tower.width, len(sources["train"].classes)).to(place.device)
    steps = {"batch_size": plan.batch_size, "steps": plan.steps, "micro_batch": args.micro_batch, "seed": args.seed}
    steps |= {"rank": place.rank, "world": place.world}
    progress = make_progress(args, plan, samples=len(images["train"]))
    train(
        head,
        lambda done: DataLoader(
            images["train"],
            batch_sampler=TrainingSteps(len(images["train"]), start=done, **steps),
            collate_fn=collate,
            **loader_options(args, place),
        ),
        lambda batch: (tower.patches(batch[0], batch[1]), batch[2].to(place.device)),
        protocol=plan,
        accumulation=TrainingSteps(len(images["train"]), **steps).accumulation,
        progress=progress,
        place=place,
    )
    scores = evaluate(head, tower, images["val"], args, place)
    measurement = make_measurement(
        args.label or args.tower,
        {f"classification_{args.size}": scores["top1"], f"classification_{args.size}_top5": scores["top5"]},
        rows=args.row,
        command=command_line("llava.eval.classification", args.argv),
        details={"task": "classification", "data": args.data, "protocol": asdict(plan), "images": len(images["val"])},
    )
    if place.rank == 0:
        write_measurement(Path(args.output) / "results.json", measurement)
    return measurement


@torch.inference_mode()
def evaluate(
    head: AttentivePoolingProbe, tower: FrozenTower, images: LabelledImages, args: argparse.Namespace, place: Place
) -> dict[str, float]:
    """Percent of the validation images whose class is the first, or among the first five; over all processes."""
    from torchmetrics.classification import MulticlassAccuracy

    head.eval()
    classes = head.classifier.out_features
    metrics = {
        name: MulticlassAccuracy(classes, top_k=min(top_k, classes), average="micro").to(place.device)
        for name, top_k in (("top1", 1), ("top5", 5))
    }
    batches = evaluation_batches(len(images), args.eval_batch_size, place.rank, place.world)
    for pixels, grids, labels in DataLoader(
        images, batch_sampler=batches, collate_fn=collate, **loader_options(args, place)
    ):
        logits = head.logits(tower.patches(pixels, grids))
        for metric in metrics.values():
            metric.update(logits, labels.to(place.device))
    return {name: round(100 * metric.compute().item(), 3) for name, metric in metrics.items()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.classification", description=__doc__.splitlines()[0])
    add_probe_flags(parser, sizes=tuple(BATCH_SIZES))
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="one in ten warms up")
    parser.add_argument("--central_share", type=float, default=CENTRAL_SHARE, help="of the short side, at evaluation")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command."""
    entry_point(make_parser(), argv, run)


if __name__ == "__main__":
    main()
