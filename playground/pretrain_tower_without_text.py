"""Pre-trains a vision tower of DINOv2's architecture that never meets a text.

`python -m playground.pretrain_tower_without_text --output runs/ablations/tower_without_text`

For the question whom the alignment loss helps (paper, Tab. 4 and 6). The objective is contrast of places: an image, a
mosaic or a piece of a training picture, is seen twice, the second time rolled by whole blocks of 2×2 patches, jittered,
lighter or darker and with noise; every block in which something is drawn has to find itself among all blocks of the
other view. A fresh stream of the training split; nothing is ever told what a block says.

B = images, D = width.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from playground import mosaic
from playground.content import PATCH
from playground.contrast import see_strokes
from playground.generate import COMPOSERS
from playground.pretrain_tower import processor_settings, to_pixels
from playground.pretraining import pretrain
from playground.splits import HELDOUT, TRAIN, Split

STEPS, BATCH, PEAK_LR = 1000, 16, 1e-3
TEMPERATURE = 0.1
_BLOCKS = mosaic.SIDE // mosaic.BLOCK  # along a side
_JITTER = 1  # px, either way


class PlaceContrast(nn.Module):
    """A DINOv2 tower (8×8 patches of 16 px, 0.9 M parameters) and the head that is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        config = Dinov2Config(
            hidden_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=mosaic.SIDE, patch_size=PATCH
        )
        self.vision = Dinov2Model(config)
        self.head = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))
        see_strokes(self.vision.embeddings.patch_embeddings.projection.weight)

    def block_vectors(self, pixels: Tensor) -> Tensor:
        """(B, 3, 128, 128) -> (B, 16, 64) unit vectors of the blocks, row by row."""
        patches = self.vision(pixels).last_hidden_state[:, 1:]
        blocks = patches[:, mosaic.patch_order("block")].unflatten(1, (_BLOCKS**2, -1)).mean(dim=2)
        return F.normalize(self.head(blocks), dim=-1)


def images(rng: random.Random, split: Split, count: int) -> Tensor:
    """(count, 3, 128, 128): mosaics and pieces of pictures by turns, in [-1, 1]."""
    drawn = [mosaic.draw_mosaic(rng, split)[0] if i % 2 else _piece(rng, split) for i in range(count)]
    return torch.stack([to_pixels(image) for image in drawn])


def _piece(rng: random.Random, split: Split) -> Image.Image:
    """128×128 px of a picture at its own resolution, cut on the patch grid; what lies outside is white."""
    kind = rng.choice(list(COMPOSERS))
    picture = COMPOSERS[kind](rng, split, rng.choice(split.sizes)).draw(rng, split)
    left, top = (PATCH * rng.randint(0, max(0, side - mosaic.SIDE) // PATCH) for side in picture.size)
    piece = Image.new("RGB", (mosaic.SIDE, mosaic.SIDE), "white")
    piece.paste(picture.crop((left, top, left + mosaic.SIDE, top + mosaic.SIDE)))
    return piece


def second_view(pixels: Tensor, down: int, right: int, generator: torch.Generator) -> Tensor:
    """The images rolled by whole blocks, so that a block's place tells nothing, and changed as a scanner might."""
    jitter = torch.randint(-_JITTER, _JITTER + 1, (2,), generator=generator).tolist()
    shift = [mosaic.BLOCK * down + jitter[0], mosaic.BLOCK * right + jitter[1]]
    rolled = pixels.roll(shift, dims=(2, 3))
    contrast = 0.6 + 0.6 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    brightness = 0.3 * (2 * torch.rand(len(pixels), 1, 1, 1, generator=generator) - 1)
    noise = 0.15 * torch.randn(pixels.shape, generator=generator)
    return (rolled * contrast + brightness + noise).clamp(-1, 1)


def place_logits(model: PlaceContrast, pixels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Cosine of every inked block with all blocks of the other view, over the temperature, and which of them it is."""
    generator = torch.Generator().manual_seed(seed)
    down, right = torch.randint(0, _BLOCKS, (2,), generator=generator).tolist()
    inked = mosaic.inked_blocks(pixels)
    moved = torch.arange(len(inked)).view(-1, _BLOCKS, _BLOCKS).roll((down, right), dims=(1, 2)).reshape(-1)
    first = model.block_vectors(pixels).flatten(0, 1)[inked]
    second = model.block_vectors(second_view(pixels, down, right, generator)).flatten(0, 1)
    return first @ second.T / TEMPERATURE, moved.argsort()[inked]


def found_share(model: PlaceContrast, split: Split, count: int = 48) -> float:
    """Share of blocks that find themselves among all of 48 unseen images."""
    logits, place = place_logits(model, images(random.Random("probe"), split, count), seed=0)
    return (logits.argmax(dim=1) == place).float().mean().item()


def main(argv: list[str] | None = None) -> int:
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m playground.pretrain_tower_without_text", description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder of the tower")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = PlaceContrast()

    def loss_of_step(step: int) -> Tensor:
        logits, place = place_logits(model, images(random.Random(f"places/{step}"), TRAIN, BATCH), seed=step)
        return F.cross_entropy(logits, place)

    def evaluate() -> str:
        return f"blocks found {found_share(model, TRAIN):.0%} (unseen fonts {found_share(model, HELDOUT):.0%})"

    checkpoint = args.output / "checkpoint.pt"
    pretrain(model, loss_of_step, checkpoint, steps=args.steps, peak=PEAK_LR, evaluate=evaluate, evaluate_every=250)
    model.vision.to(torch.bfloat16).save_pretrained(args.output)
    settings = processor_settings("BitImageProcessor")
    (args.output / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
    checkpoint.unlink()
    print(f"{args.output}: tower saved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
