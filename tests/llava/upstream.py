"""The golden files of LLaVA-NeXT (tests/data/upstream), and the formulas by which their inputs were made."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "upstream"
ONEVISION = [[384 * w, 384 * h] for w in range(1, 7) for h in range(1, 7)]
TOWERS = {"v15": "clip", "onevision": "siglip"}
NEXT = [[672, 336], [336, 672], [672, 672], [1008, 336], [336, 1008]]


def wave(*shape: int, step: float = 0.37) -> torch.Tensor:
    """cos(0, step, 2·step, ...), float32."""
    size = int(np.prod(shape))
    return _wave(max(size, 100_000), step)[:size].reshape(shape)


@cache
def _wave(size: int, step: float) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float64).mul(step).cos().float()


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray((wave(height, width, 3, step=0.0071).numpy() * 127 + 128).astype(np.uint8))


def digest(features: torch.Tensor) -> tuple[int, float]:
    """Number of rows, and the sum of all values, each with a weight of its own."""
    return len(features), float((features.double() * wave(*features.shape, step=1.3).double()).sum())


def golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


def save_release(folder: Path, name: str, llm: Path, **changes: object) -> Path:
    """One of the tiny checkpoints with a tokenizer, as a release has one, naming its tower where that lies here.

    `changes` are of its config; where they turn it to `unpad`, it gets an image_newline too.
    """
    shutil.copytree(GOLDEN / name, folder)
    config = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": str(GOLDEN / TOWERS[name])}
    (folder / "config.json").write_text(json.dumps(config | changes))
    if "unpad" in (config | changes)["mm_patch_merge_type"]:
        tensors = load_file(folder / "model.safetensors")
        tensors.setdefault("model.image_newline", torch.linspace(-1, 1, 32))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(llm).save_pretrained(folder)
    return folder
