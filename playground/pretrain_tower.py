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
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from playground import mosaic, sizes
from playground.content import Content
from playground.contrast import Contrast, sigmoid_loss
from playground.generate import COMPOSERS
from playground.pretraining import pretrain
from playground.splits import HELDOUT, TRAIN, Split
from playground.words import COLOURS, NUMBERS, SHAPES

STEPS, BATCH, PEAK_LR = 4000, 12, 1e-3
WHOLE_PICTURES_FROM = 0.7  # share of the steps after which whole pictures join
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


def mosaic_vectors(model: Contrast, pixels: torch.Tensor, captions: list[str], pooling: str):
    """Vectors of the cells of mosaics, or of the blocks in which something is drawn, and the caption of each."""
    order = mosaic.patch_order(pooling)
    if pooling == "cell":
        return model.image_vectors(pixels, order, mosaic.CELLS), captions
    inked = mosaic.inked_blocks(pixels)
    captions = [caption for caption in captions for _ in range(mosaic.BLOCKS_PER_CELL)]
    vectors = model.image_vectors(pixels, order, mosaic.CELLS * mosaic.BLOCKS_PER_CELL)
    return vectors[inked], [caption for caption, kept in zip(captions, inked.tolist(), strict=True) if kept]


def mosaic_loss(model: Contrast, rng: random.Random, pooling: str) -> torch.Tensor:
    """Contrast of every cell or block with every caption of the batch."""
    images, captions = mosaic_vectors(model, *mosaic_batch(rng, TRAIN, BATCH), pooling)
    texts = sorted(set(captions))
    holds = torch.tensor([[text == caption for text in texts] for caption in captions])
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


def reading_accuracy(model: Contrast, split: Split, pooling: str, count: int = 48) -> dict[str, float]:
    """Share of cells or blocks whose caption wins among all captions of its kind (160 words, 90 numbers, ...)."""
    images, captions = mosaic_vectors(model, *mosaic_batch(random.Random("probe"), split, count), pooling)
    accuracy = {}
    for kind, candidates in _CANDIDATES.items():
        chosen = [place for place, caption in enumerate(captions) if caption in set(candidates)]
        best = (images[chosen] @ model.text_vectors(candidates).T).argmax(1).tolist()
        right = sum(candidates[guess] == captions[place] for guess, place in zip(best, chosen, strict=True))
        accuracy[kind] = right / len(chosen)
    return accuracy


def load_tower(model: Contrast, folder: Path) -> None:
    """Takes the weights of a saved tower; the head and the text tower, which are never saved, stay as they are."""
    weights = load_file(folder / "model.safetensors")
    model.vision.load_state_dict({n.removeprefix("vision_model."): w.float() for n, w in weights.items()}, strict=False)


def save_tower(model: Contrast, output: Path) -> None:
    """The tower without its head in bfloat16, in transformers' format, and SigLIP's image processor settings."""
    vision = model.vision.to(torch.bfloat16)
    vision.config.vision_use_head = False
    vision.config.architectures = ["SiglipVisionModel"]
    vision.config.save_pretrained(output)
    # The names of published SigLIP checkpoints.
    weights = {f"vision_model.{n}": w.contiguous() for n, w in vision.state_dict().items() if not n.startswith("head.")}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    settings = processor_settings("SiglipImageProcessor")
    (output / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


def processor_settings(image_processor_type: str) -> dict:
    """What a tower's preprocessor_config.json says: the pre-training size, and pixels in [-1, 1]."""
    return {
        "image_processor_type": image_processor_type,
        "do_resize": True,
        "size": {"height": mosaic.SIDE, "width": mosaic.SIDE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m playground.pretrain_tower", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the tower")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the LLM's tokenizer")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pooling", choices=("cell", "block"), default="block", help="what the head pools of a mosaic")
    parser.add_argument("--start-from", type=Path, help="folder of an earlier tower; head and text tower start anew")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = Contrast(AutoTokenizer.from_pretrained(args.tokenizer))
    if args.start_from:
        load_tower(model, args.start_from)

    def loss_of_step(step: int) -> torch.Tensor:
        rng = random.Random(f"tower/{step}")
        if step >= WHOLE_PICTURES_FROM * args.steps and step % 3 == 0:
            return picture_loss(model, rng)
        return mosaic_loss(model, rng, args.pooling)

    def evaluate() -> str:
        seen, unseen = (reading_accuracy(model, split, args.pooling) for split in (TRAIN, HELDOUT))
        return ", ".join(f"{kind} {seen[kind]:.0%} (unseen fonts {unseen[kind]:.0%})" for kind in seen)

    checkpoint = args.output / "checkpoint.pt"
    pretrain(model, loss_of_step, checkpoint, steps=args.steps, peak=PEAK_LR, evaluate=evaluate, evaluate_every=250)
    save_tower(model, args.output)
    checkpoint.unlink()
    print(f"{args.output}: tower saved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
