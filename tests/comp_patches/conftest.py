"""Tiny real parts for the method's tests: seeded float32 towers, checkpoints, images, golden files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from comp_patches.packing import frames_on_host, patch_coordinates
from comp_patches.vision_transformer import PackedVisionTransformer, VisionTransformerConfig

DATA = Path(__file__).parent.parent / "data"

TINY = {
    "family": "siglip",
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 56,
    "position_grid": (4, 4),
}


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random and non-zero: norms and biases too, which initialisation leaves at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


@pytest.fixture
def tiny_tower():
    """A function that builds a seeded tiny tower; keyword arguments override its config."""

    def build(**overrides) -> PackedVisionTransformer:
        return randomise(PackedVisionTransformer(VisionTransformerConfig(**TINY | overrides)))

    return build


@pytest.fixture
def random_patches():
    """A function from grids (N, 3) to seeded packed patches."""

    def make(grids, patch_dim: int = 588) -> torch.Tensor:
        count = sum(t * h * w for t, h, w in grids)
        return torch.randn(count, patch_dim, generator=torch.Generator().manual_seed(1))

    return make


@pytest.fixture
def noise_image():
    """A function that draws a seeded RGB image of noise."""

    def draw(width: int, height: int, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return draw


@pytest.fixture
def golden():
    """A function that reads a golden file by name."""
    return lambda name: load_file(DATA / f"{name}.safetensors")


@pytest.fixture
def golden_checkpoint(tmp_path):
    """A function that lays a golden tower out as a checkpoint folder; `architectures` tells released from original."""

    def lay_out(name: str, **config) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        weights = {key: tensor.float() for key, tensor in load_file(DATA / f"{name}.weights.safetensors").items()}
        save_file(weights, folder / "model.safetensors")
        vision = json.loads((DATA / f"{name}.config.json").read_text())
        form = (
            {"model_type": "siglip", "vision_config": vision} if "siglip" in name else {"model_type": "dinov2"} | vision
        )
        (folder / "config.json").write_text(json.dumps(form | config))
        return folder

    return lay_out


@pytest.fixture
def coordinates():
    """A function from grids to coordinates, in block order unless told otherwise."""
    return lambda grids, merge_size=2: patch_coordinates(frames_on_host(grids), merge_size)
