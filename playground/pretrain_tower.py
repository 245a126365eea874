"""Pre-trains the embedded default's vision tower.

`python -m playground.pretrain_tower --output playground/models/tower --tokenizer playground/models/llm`

Sigmoid contrast of images and captions, as SigLIP is trained, at one fixed size (128×128 px). First mosaics
(mosaic.py), then every other batch whole pictures of the training generator, squashed to the size, of one kind per
batch, against parts of their captions: captions that differ in few facts are the hard negatives. A fresh stream of
the training split; held-out fonts are looked at to report accuracy, never trained on. The pooling head and the text
tower are dropped at the end; the weights are saved as bfloat16.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer

from playground import mosaic, sizes
from playground.content import Content
from playground.contrast import Contrast, sigmoid_loss
from playground.generate import COMPOSERS
from playground.pretraining import pretrain
from playground.splits import HELDOUT, TRAIN, Split
from playground.words import COLOURS, NUMBERS, SHAPES

STEPS, BATCH, PEAK_LR = 6000, 12, 1e-3
WHOLE_PICTURES_FROM = 0.6  # share of the steps after which whole pictures join
_WHOLE_BATCH = 16
_KIND_SHARES = (0.5, 0.3, 0.2)  # document, chart, scene
_PARTS = 6  # captions per whole picture
_CANDIDATES = {
    "word": [f"{field}: {word}" for field, word in mosaic.WORDS],
    "number": [f"number: {number}" for number in NUMBERS],
    "bar": [f"{colour}: {number}" for colour in COLOURS for number in NUMBERS],
    "shape": [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES],
}


def to_pixels(image: Image.Image) -> torch.Tensor:
    """(3, 128, 128) in [-1, 1]; other sizes are squashed."""
    if image.size != (mosaic.SIDE, mosaic.SIDE):
        image = image.resize((mosaic.SIDE, mosaic.SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def mosaic_batch(rng: random.Random, split: Split, count: int) -> tuple[torch.Tensor, list[str]]:
    """(count, 3, 128, 128) mosaics and the captions of all their cells."""
    drawn = [mosaic.draw_mosaic(rng, split) for _ in range(count)]
    return torch.stack([to_pixels(image) for image, _ in drawn]), [text for _, texts in drawn for text in texts]


def mosaic_loss(model: Contrast, rng: random.Random, order: torch.Tensor) -> torch.Tensor:
    """Contrast of every cell with every caption of the batch."""
    pixels, captions = mosaic_batch(rng, TRAIN, BATCH)
    texts = sorted(set(captions))
    holds = torch.tensor([[text == caption for text in texts] for caption in captions])
    images = model.image_vectors(pixels, order, mosaic.CELLS)
    return sigmoid_loss(model.logits(images, model.text_vectors(texts)), holds)


def caption_parts(content: Content, rng: random.Random) -> list[str]:
    """Single facts and pairs of neighbouring facts, as they stand in the caption."""
    statements = content.caption().split(". ", 1)[1].split("; ")
    start = rng.randrange(len(statements))
    pair = "; ".join(statements[start : start + 2])
    facts = content.facts()
    return [pair, *rng.sample(facts, min(len(facts), _PARTS - 1))]


def picture_loss(model: Contrast, rng: random.Random) -> torch.Tensor:
    """Contrast of whole pictures of one kind with parts of all their captions; a part holds where a caption has it."""
    kind = rng.choices(list(COMPOSERS), _KIND_SHARES)[0]
    contents = []
    for _ in range(_WHOLE_BATCH):
        size = (mosaic.SIDE, mosaic.SIDE) if rng.random() < 0.5 else rng.choice(sizes.SMALL_TRAIN_SIZES)
        contents.append(COMPOSERS[kind](rng, TRAIN, size))
    pixels = torch.stack([to_pixels(content.draw(rng, TRAIN)) for content in contents])
    texts = sorted({part for content in contents for part in caption_parts(content, rng)})
    holds = torch.tensor([[text in content.caption() for text in texts] for content in contents])
    return sigmoid_loss(model.logits(model.image_vectors(pixels), model.text_vectors(texts)), holds)


def reading_accuracy(model: Contrast, split: Split, count: int = 48) -> dict[str, float]:
    """Share of mosaic cells whose caption wins among all captions of its kind (160 words, 90 numbers, ...)."""
    pixels, captions = mosaic_batch(random.Random("probe"), split, count)
    images = model.image_vectors(pixels, mosaic.cell_order(), mosaic.CELLS)
    accuracy = {}
    for kind, candidates in _CANDIDATES.items():
        cells = [cell for cell, caption in enumerate(captions) if caption in set(candidates)]
        best = (images[cells] @ model.text_vectors(candidates).T).argmax(1).tolist()
        right = sum(candidates[guess] == captions[cell] for guess, cell in zip(best, cells, strict=True))
        accuracy[kind] = right / len(cells)
    return accuracy


def save_tower(model: Contrast, output: Path) -> None:
    """The tower without its head in bfloat16, in transformers' format, and SigLIP's image processor settings."""
    vision = model.vision.to(torch.bfloat16)
    vision.config.vision_use_head = False
    vision.config.architectures = ["SiglipVisionModel"]
    vision.config.save_pretrained(output)
    # The names of published SigLIP checkpoints.
    weights = {f"vision_model.{n}": w.contiguous() for n, w in vision.state_dict().items() if not n.startswith("head.")}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": mosaic.SIDE, "width": mosaic.SIDE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (output / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m playground.pretrain_tower", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the tower")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the LLM's tokenizer")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = Contrast(AutoTokenizer.from_pretrained(args.tokenizer))
    order = mosaic.cell_order()

    def loss_of_step(step: int) -> torch.Tensor:
        rng = random.Random(f"tower/{step}")
        if step >= WHOLE_PICTURES_FROM * args.steps and step % 2:
            return picture_loss(model, rng)
        return mosaic_loss(model, rng, order)

    def evaluate() -> str:
        seen, unseen = (reading_accuracy(model, split) for split in (TRAIN, HELDOUT))
        return ", ".join(f"{kind} {seen[kind]:.0%} (unseen fonts {unseen[kind]:.0%})" for kind in seen)

    checkpoint = args.output / "checkpoint.pt"
    pretrain(model, loss_of_step, checkpoint, steps=args.steps, peak=PEAK_LR, evaluate=evaluate, evaluate_every=250)
    save_tower(model, args.output)
    checkpoint.unlink()
    print(f"{args.output}: tower saved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
