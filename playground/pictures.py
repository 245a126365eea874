"""Draws the pictures of docs/method.md with the method's own code:

    python -m playground.pictures --output docs/images

The tower is the shipped one (playground/models/tower: 8×8 positions, 16-px patches), the image a held-out document.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cosine_similarity

from comp_patches.image_processor import NativeImageProcessor
from comp_patches.packing import PatchCoordinates, patch_coordinates
from comp_patches.position_embedding import LearnedPositionEmbedding
from comp_patches.rope import apply_rope, rope_2d
from comp_patches.towers import load_vision_transformer
from playground.generate import make_picture
from playground.splits import HELDOUT

ROOT = Path(__file__).parents[1]
TOWER = f"comp-siglip:{ROOT}/playground/models/tower"
SIZE = (384, 160)  # px, of the image
PROBE = (3, 8)  # row and column of the patch that others are compared with
DPI = 80


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m playground.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder of the pictures")
    folder = parser.parse_args(argv).output
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("native_resolution", native_resolution), ("c_rope", c_rope)):
        draw().savefig(folder / f"{name}.png", dpi=DPI)
        print(folder / f"{name}.png")


def native_resolution() -> Figure:
    """One image on three token budgets, and in which order its patches come."""
    image = make_picture(HELDOUT, seed=3, number=0, size=SIZE).image
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(2, 2)
    for panel, budget in zip(panels.flat, (256, 24, 8), strict=False):
        processor = NativeImageProcessor(patch_size=16, max_num_vistoken=budget)
        _, rows, cols = processor([image])["image_grid_thw"][0].tolist()
        seen = image.resize((cols * 16, rows * 16))
        panel.imshow(seen, extent=(0, cols, rows, 0))
        grid_lines(panel, rows, cols)
        panel.set_title(f"at most {budget} tokens: {rows} x {cols} patches, {rows * cols // 4} tokens", fontsize=10)
    order = panels.flat[-1]
    coordinates = patch_coordinates([(4, 10)], merge_size=2)
    for number, (y, x) in enumerate(zip(coordinates.y.tolist(), coordinates.x.tolist(), strict=True)):
        order.text(x + 0.5, y + 0.5, str(number), ha="center", va="center", fontsize=9)
    grid_lines(order, 4, 10)
    order.set(xlim=(0, 10), ylim=(4, 0), aspect="equal")
    order.set_title("order of the patches: four in a row are one token", fontsize=10)
    return figure


def grid_lines(panel: Axes, rows: int, cols: int) -> None:
    """Patches in thin lines, tokens (2×2 patches) in thick ones."""
    panel.set(xticks=[], yticks=[])
    panel.vlines(range(cols + 1), 0, rows, color="#93c5fd", linewidth=0.5)
    panel.hlines(range(rows + 1), 0, cols, color="#93c5fd", linewidth=0.5)
    panel.vlines(range(0, cols + 1, 2), 0, rows, color="#2563eb", linewidth=1.1)
    panel.hlines(range(0, rows + 1, 2), 0, cols, color="#2563eb", linewidth=1.1)


def c_rope() -> Figure:
    """What each half of C-RoPE says about where a patch is, seen from one patch."""
    rows, cols = SIZE[1] // 16, SIZE[0] // 16
    coordinates = patch_coordinates([(rows, cols)], merge_size=1)
    tower = load_vision_transformer(TOWER, merge_size=1)
    learned: LearnedPositionEmbedding = tower.position_embedding
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(2, 2, width_ratios=(1, 2.4))
    own = patch_coordinates([(learned.rows, learned.cols)], merge_size=1)
    with torch.no_grad():
        show(panels[0, 0], likeness(learned(own), 3, 3, learned.cols), (3, 3), "learned, at 8 x 8")
        stretched = likeness(learned(coordinates), *PROBE, cols)
    show(panels[0, 1], stretched, PROBE, f"learned, interpolated to {rows} x {cols}: stretches with the image")
    head = tower.config.hidden_size // tower.config.num_attention_heads
    turned = rotary_score(coordinates, head, *PROBE, cols)
    show(panels[1, 1], turned, PROBE, "RoPE-2D: says how many patches apart, at any size")
    near = rotary_score(own, head, 3, 3, learned.cols)
    show(panels[1, 0], near, (3, 3), "RoPE-2D, at 8 x 8")
    return figure


def likeness(embedding: Tensor, row: int, col: int, cols: int) -> Tensor:
    """(P, D) -> (rows, cols), cosine of every position's embedding with that of one."""
    centred = embedding - embedding.mean(0)
    return cosine_similarity(centred, centred[row * cols + col], dim=-1).view(-1, cols)


def rotary_score(coordinates: PatchCoordinates, head: int, row: int, col: int, cols: int) -> Tensor:
    """(rows, cols), attention score of equal queries and keys of ones, as a share of that without a turn."""
    cos, sin = rope_2d(coordinates.y, coordinates.x, head)
    turned = apply_rope(torch.ones(len(cos), head), cos, sin)
    return (turned @ turned[row * cols + col] / head).view(-1, cols)


def show(panel: Axes, values: Tensor, probe: tuple[int, int], title: str) -> None:
    panel.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
    panel.plot(probe[1], probe[0], "k+", markersize=9)
    panel.set(xticks=[], yticks=[])
    panel.set_title(title, fontsize=10)


if __name__ == "__main__":
    main()
