"""What a training step costs beside what it cannot avoid: `python scripts/bench/train_step.py`.

`step`: a Stage-II step beside its matrix products. `loss`: the decoding loss beside full logits. `padding`: packed
micro-batches beside padded ones. fp32, one process, times taken in turns; ratios are what to compare.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from llava_steps import LLM, MERGE, Grids, Model, floor, packed, padded, padded_text, updated
from rich.console import Console
from rich.table import Table
from timing import Run, best_seconds, machine, parse, peak_megabytes, show
from torch import Tensor
from torch.nn import functional as F
from tower import GRIDS

from llava.model.decoding_loss import ROWS_PER_CHUNK, decoding_loss

STEPS = {"floor": floor, "ours, forward and backward": packed, "ours, with AdamW's update": updated}
PADDINGS = {"ours, packed": packed, "text padded": padded_text, "text and images padded": padded}
MOST_TIMES_FLOOR, LEAST_TIMES_PACKED = 1.5, 1.5
MOST_SECONDS, MOST_MEMORY = 1.15, 0.15  # of full logits'


def step(model: Model, grids: Grids, rounds: int, console: Console) -> None:
    """One micro-batch of every second image."""
    batches = [grids[::2]]
    describe(model, batches, console)
    seconds = best_seconds({name: make(model, batches) for name, make in STEPS.items()}, rounds, "step")
    table = Table("step", "s", "÷ floor", "at most")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}", f"{value / seconds['floor']:.2f}", _bar(name != "floor", MOST_TIMES_FLOOR))
    show(table, console)


def padding(model: Model, grids: Grids, rounds: int, console: Console) -> None:
    """Forward and backward of two micro-batches, each of every second image. Padding does not count as tokens."""
    batches = [grids[::2], grids[1::2]]
    tokens = describe(model, batches, console)
    seconds = best_seconds({name: make(model, batches) for name, make in PADDINGS.items()}, rounds, "padding")
    table = Table("micro-batches", "s", "tokens / s", "÷ packed", "at least")
    for name, value in seconds.items():
        ratio = value / seconds["ours, packed"]
        bar = _bar(name != "ours, packed", LEAST_TIMES_PACKED)
        table.add_row(name, f"{value:.2f}", f"{tokens / value:.0f}", f"{ratio:.2f}", bar)
    show(table, console)


def describe(model: Model, batches: Sequence[Grids], console: Console) -> int:
    """Print what is in the micro-batches; the number of the LLM's tokens."""
    vit, llm = model.vit, model.llm
    console.print(f"tower: width {vit.width}, {vit.layers} layers; LLM: width {llm.width}, {llm.layers} layers")
    total = 0
    for grids in batches:
        batch = model.micro_batch(grids)
        tokens, patches = batch["input_ids"].numel(), len(batch["pixel_values"])
        console.print(
            f"{len(grids)} samples: {patches} patches, {patches // MERGE**2} visual tokens, {tokens} tokens, "
            f"{model.answer * len(grids)} of them supervised; grids {' '.join(f'{h}x{w}' for h, w in grids)}"
        )
        total += tokens
    return total


@dataclass(frozen=True)
class LossSize:
    """What all losses of a comparison share: supervised tokens, V and H. Time does not depend on the random inputs."""

    tokens: int
    words: int
    width: int
    device: str

    def run(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        """Forward and backward of a mean loss of hidden states (1, L, H), head (V, H) and labels (1, L)."""
        hidden = torch.randn(1, self.tokens + 1, self.width, device=self.device, requires_grad=True)
        head = torch.randn(self.words, self.width, device=self.device).mul_(self.width**-0.5).requires_grad_()
        labels = torch.randint(self.words, (1, self.tokens + 1), device=self.device)

        def run() -> None:
            hidden.grad = head.grad = None
            loss(hidden, head, labels).backward()

        return run


def ours(size: LossSize) -> Run:
    return size.run(decoding_loss)


def full_logits(size: LossSize) -> Run:
    return size.run(lambda hidden, head, labels: F.cross_entropy(F.linear(hidden[0, :-1], head), labels[0, 1:]))


def in_torchs_chunks(size: LossSize) -> Run:
    """torch's own, since 2.13, in chunks of our size."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=ROWS_PER_CHUNK)
    return size.run(
        lambda hidden, head, labels: F.linear_cross_entropy(hidden[0, :-1], head, labels[0, 1:], options=options)
    )


LOSSES = {"full logits": full_logits, "ours": ours}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    LOSSES["torch's chunks"] = in_torchs_chunks


def loss(size: LossSize, rounds: int, console: Console) -> None:
    seconds = best_seconds({name: make(size) for name, make in LOSSES.items()}, rounds, "loss")
    peaks = {name: peak_megabytes(make, size) for name, make in LOSSES.items()}
    table = Table("loss", "s", "÷ full", "at most", "extra peak MB", "% of full", "at most")
    table.title = f"{size.tokens} tokens, {size.words} words, width {size.width}"
    for name, value in seconds.items():
        time, memory = value / seconds["full logits"], peaks[name] / peaks["full logits"]
        bars = [_bar(name == "ours", bar) for bar in (MOST_SECONDS, f"{100 * MOST_MEMORY:.0f}")]
        table.add_row(
            name, f"{value:.2f}", f"{time:.2f}", bars[0], f"{peaks[name]:.0f}", f"{100 * memory:.1f}", bars[1]
        )
    show(table, console)


def _bar(applies: bool, value: object) -> str:
    return str(value) if applies else ""


PARTS = ("step", "loss", "padding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--layers", type=int, default=4, help="of the tower and of the LLM")
    parser.add_argument("--images", type=int, default=len(GRIDS), help="only the first so many of the 16 images")
    parser.add_argument("--tokens", type=int, default=4096, help="of the part loss")
    parser.add_argument("--words", type=int, default=LLM.words, help="default: Qwen2.5's")
    parser.add_argument("--rounds", type=int, default=2)
    args = parse(parser)
    console = Console(width=140)
    console.print(machine())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(llm=LLM(words=args.words, layers=args.layers), device=device)
    model = replace(model, vit=replace(model.vit, layers=args.layers))
    if "step" in args.parts:
        step(model, GRIDS[: args.images], args.rounds, console)
    if "loss" in args.parts:
        loss(LossSize(args.tokens, args.words, LLM.width, device), args.rounds, console)
    if "padding" in args.parts:
        padding(model, GRIDS[: args.images], args.rounds, console)


if __name__ == "__main__":
    main()
