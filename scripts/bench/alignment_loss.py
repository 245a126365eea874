"""Speed and memory of the alignment loss beside what it cannot avoid: `python scripts/bench/alignment_loss.py`.

Forward and backward in fp32, times taken in turns; ratios are what to compare. B = samples, H = LLM width,
V = vocabulary. The *floor* is three bare matrix products: two of scores and one of a gradient; with either side first,
since the faster order differs by processor, and the faster one counts.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from timing import Run, best_seconds, machine, parse, peak_megabytes, show
from torch import Tensor
from torch.nn import functional as F

from comp_patches.alignment_loss import alignment_loss

TEMPERATURE, ITERATIONS, PRIOR_TEMPERATURE = 0.005, 3, 0.05


@dataclass(frozen=True)
class Size:
    """What all ways of a comparison share. Inputs are random: time does not depend on them."""

    samples: int
    words: int
    width: int
    device: str

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Visual features, which get gradients, and text features (B, H), W (V, H), the prior (V,)."""
        torch.manual_seed(0)
        visual, text = torch.randn(2, self.samples, self.width, device=self.device)
        words = torch.randn(self.words, self.width, device=self.device)
        prior = torch.rand(self.words, device=self.device) + 0.01
        return visual.requires_grad_(), text, words, prior / prior.sum()


def floor(size: Size, *, words_first: bool) -> Run:
    """The matrix products alone."""
    visual, text, words, _ = size.inputs()
    visual = visual.detach()

    def features_first_run() -> None:
        scores = visual @ words.T
        text @ words.T
        scores @ words

    def words_first_run() -> None:
        scores = words @ visual.T
        words @ text.T
        words.T @ scores

    return words_first_run if words_first else features_first_run


def ours(size: Size, mode: str) -> Run:
    return _stepped(size, partial(alignment_loss, mode=mode))


def literal(size: Size, targets_of: Callable[[Tensor, Tensor], Tensor]) -> Run:
    return _stepped(size, partial(literal_loss, targets_of=targets_of))


def _stepped(size: Size, loss: Callable[..., Tensor]) -> Run:
    visual, *others = size.inputs()

    def run() -> None:
        visual.grad = None
        loss(visual, *others).backward()

    return run


def literal_loss(
    visual: Tensor, text: Tensor, words: Tensor, prior: Tensor, targets_of: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Eq. 6-10 as they stand: W normalised into a copy, plain exponents, autograd's own backward pass."""
    words = F.normalize(words, dim=-1)
    with torch.no_grad():
        target = targets_of(F.normalize(text, dim=-1) @ words.T, prior)
    log_predicted = torch.log_softmax(F.normalize(visual, dim=-1) @ words.T / TEMPERATURE, dim=-1)
    return -(target * log_predicted).sum(dim=-1).mean()


def released_targets(scores: Tensor, prior: Tensor) -> Tensor:
    """What the authors' code does: their rounds scale by the prior and renormalise each sample."""
    plan = torch.exp(scores / TEMPERATURE).T
    share = torch.softmax(prior / PRIOR_TEMPERATURE, dim=0)[:, None]
    for _ in range(ITERATIONS):
        plan = plan * share
        plan = plan / plan.sum(dim=0, keepdim=True)
    return plan.T


def sinkhorn_targets(scores: Tensor, prior: Tensor) -> Tensor:
    """Eq. 9: rounds that give the words their prior and each sample its share."""
    plan = torch.exp(scores / TEMPERATURE).T
    for _ in range(ITERATIONS):
        plan = plan * (prior / plan.sum(dim=1))[:, None]
        plan = plan / (plan.sum(dim=0, keepdim=True) * plan.shape[1])
    return (plan * plan.shape[1]).T


WAYS: dict[str, Callable[[Size], Run]] = {
    "floor, features first": partial(floor, words_first=False),
    "floor, words first": partial(floor, words_first=True),
    "ours, prior_softmax": partial(ours, mode="prior_softmax"),
    "ours, sinkhorn": partial(ours, mode="sinkhorn"),
    "literal, as released": partial(literal, targets_of=released_targets),
    "literal, Eq. 9": partial(literal, targets_of=sinkhorn_targets),
}
MOST_TIMES_FLOOR = {"ours, prior_softmax": 1.5, "ours, sinkhorn": 3.0}


def compare(size: Size, rounds: int) -> Table:
    """Seconds, ratio and memory of each way; and, of ours, the most that they should be."""
    seconds = best_seconds({name: make(size) for name, make in WAYS.items()}, rounds, f"{size.samples} samples")
    fastest_floor = min(value for name, value in seconds.items() if name.startswith("floor"))
    matrix = size.samples * size.words * 4 / 2**20
    table = Table("", "s", "÷ floor", "at most", "extra peak MB", "at most")
    table.title = f"{size.samples} samples, {size.words} words, width {size.width}, fp32 on {size.device}"
    for name, value in seconds.items():
        bars = (f"{MOST_TIMES_FLOOR[name]:.1f}", f"{6 * matrix + 64:.0f}") if name in MOST_TIMES_FLOOR else ("", "")
        peak = f"{peak_megabytes(WAYS[name], size):.0f}"
        table.add_row(name, f"{value:.3f}", f"{value / fastest_floor:.2f}", bars[0], peak, bars[1])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--words", type=int, default=151936, help="default: Qwen2.5's")
    parser.add_argument("--width", type=int, default=896, help="default: Qwen2.5-0.5B's")
    parser.add_argument("--rounds", type=int, default=3)
    args = parse(parser)
    console = Console(width=120)
    console.print(machine())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for samples in args.samples:
        show(compare(Size(samples, args.words, args.width, device), args.rounds), console)


if __name__ == "__main__":
    main()
