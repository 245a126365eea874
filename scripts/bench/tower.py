"""Speed and memory of the packed tower beside transformers' encoders: `python scripts/bench/tower.py`.

One process, one batch of 16 images of mixed sizes, times taken in turns; ratios are what to compare. A GPU is used if
there is one.
"""

import argparse
from dataclasses import replace

import torch
from encoders import ENCODERS, Setting, ViT
from rich.console import Console
from rich.table import Table
from timing import Run, best_seconds, machine, parse, peak_megabytes, show

GRIDS = (
    *((16, 16), (16, 24), (20, 28), (24, 24), (24, 32), (28, 40), (32, 32), (34, 44)),
    *((36, 48), (40, 30), (44, 34), (48, 36), (52, 40), (54, 72), (16, 40), (30, 20)),
)
VITS = {"width384": ViT(width=384, heads=6, layers=12, mlp=1536), "so400m": ViT(1152, 16, 2, 4304)}
PARTS = ("forward", "backward", "growth")
GROWTH_SIZES = {"448 x 448": (32, 32), "1024 x 768": (74, 54)}
GROWTH_COUNTS = (1, 4, 16, 64)


def compare(setting: Setting, names: list[str], rounds: int, console: Console) -> None:
    """A table of one ViT: seconds, images a second, ratios and memory of each encoder."""
    what = "forward and backward" if setting.backward else "forward"
    seconds = best_seconds({name: ENCODERS[name](setting) for name in names}, rounds, what)
    title = f"{_title(setting, what)}, {len(setting.grids)} images, {sum(setting.lengths)} patches"
    table = Table("encoder", "s / batch", "images / s", "÷ floor", "÷ ours", "extra peak MB", title=title)
    for name, value in seconds.items():
        ratios = [f"{value / seconds[base]:.2f}" if base in seconds else "-" for base in ("floor", "ours")]
        peak = f"{peak_megabytes(ENCODERS[name], setting):.0f}"
        table.add_row(name, f"{value:.2f}", f"{len(setting.grids) / value:.2f}", *ratios, peak)
    show(table, console)


def growth(setting: Setting, rounds: int, console: Console) -> None:
    """Milliseconds per image of 1, 4, 16 and 64 images a call. A round is 64 images of each, whatever the call holds:
    then what disturbs the machine weighs on all alike."""
    table = Table("image", *(f"{count} images, ms each" for count in GROWTH_COUNTS), "largest ÷ least")
    table.title = _title(setting, "forward, ours")
    for label, grid in GROWTH_SIZES.items():
        runs = {str(count): _repeated(replace(setting, grids=(grid,) * count)) for count in GROWTH_COUNTS}
        each = [1000 / max(GROWTH_COUNTS) * seconds for seconds in best_seconds(runs, rounds, label).values()]
        table.add_row(label, *(f"{value:.1f}" for value in each), f"{max(each) / min(each):.2f}")
    show(table, console)


def _repeated(setting: Setting) -> Run:
    """Ours, called so often that it sees as many images as in the largest batch."""
    run, calls = ENCODERS["ours"](setting), max(GROWTH_COUNTS) // len(setting.grids)

    def run_all() -> None:
        for _ in range(calls):
            run()

    return run_all


def _title(setting: Setting, what: str) -> str:
    vit = setting.vit
    dtype = str(setting.dtype).removeprefix("torch.")
    return f"{what}: width {vit.width}, {vit.heads} heads, {vit.layers} layers, {dtype} on {setting.device}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vit", choices=VITS, nargs="+", default=list(VITS))
    parser.add_argument("--layers", type=int, help="this many layers instead")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--encoders", choices=ENCODERS, nargs="+", default=list(ENCODERS), metavar="NAME")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--images", type=int, default=len(GRIDS), help="only the first so many images of the batch")
    parser.add_argument("--rounds", type=int, default=2)
    args = parse(parser)
    console = Console(width=140)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console.print(machine())
    for vit in (VITS[name] for name in args.vit):
        vit = replace(vit, layers=args.layers or vit.layers)
        setting = Setting(vit, GRIDS[: args.images], getattr(torch, args.dtype), device, backward=False)
        if "forward" in args.parts:
            compare(setting, args.encoders, args.rounds, console)
        if "backward" in args.parts:
            compare(replace(setting, backward=True), args.encoders, args.rounds, console)
    if "growth" in args.parts:
        growth(replace(setting, vit=replace(VITS["width384"], layers=2)), args.rounds, console)


if __name__ == "__main__":
    main()
