"""Training goes on from LLaVA's checkpoints with plain towers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llava.model.builder import load_pretrained_model
from tests.llava import tiny
from tests.llava.ranks import train_alone

KEYS = {
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "[(32, 32), (64, 32), (32, 64), (64, 64)]",
    "mm_spatial_pool_mode": "average",
    "mm_vision_select_layer": -2,
}
PLAIN = {"mm_projector_type": "mlp2x_gelu", "force_resize": None, "use_rope": None, "max_steps": 1}


@pytest.fixture(scope="module")
def flat(llm, siglip, data, tmp_path_factory):
    """A checkpoint of one tile an image."""
    folder = tmp_path_factory.mktemp("flat") / "out"
    changes = tiny.FULL_STAGE | PLAIN | {"vision_tower": f"siglip:{siglip}"}
    train_alone(tiny.stage_arguments(llm, siglip, data, folder, **changes))
    return folder


def test_a_checkpoint_goes_on_with_tiles(flat, siglip, data, tmp_path, caplog):
    changes = tiny.FULL_STAGE | PLAIN | KEYS | {"vision_tower": None}
    train_alone(tiny.stage_arguments(flat, siglip, data, tmp_path / "out", **changes))
    assert "no image_newline; it begins at random" in caplog.text
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: config[key] for key in KEYS} == KEYS
    newline = load_file(tmp_path / "out/model.safetensors")["model.image_newline"]
    assert 0.05 < newline.std() < 0.5
    model = load_pretrained_model(str(tmp_path / "out"), device="cpu")[1]
    assert torch.equal(model.get_model().image_newline, newline)


def test_llavas_own_checkpoint_can_be_trained_on(flat, siglip, data, tmp_path):
    """Its config names the tower and does not describe it."""
    upstream = shutil.copytree(flat, tmp_path / "upstream")
    config = json.loads((upstream / "config.json").read_text())
    for key in ("mm_vision_config", "mm_image_processor", "mm_base_model"):
        del config[key]
    (upstream / "config.json").write_text(json.dumps(config | {"mm_vision_tower": f"siglip:{siglip}"}))
    changes = tiny.FULL_STAGE | PLAIN | {"vision_tower": None}
    train_alone(tiny.stage_arguments(upstream, siglip, data, tmp_path / "out", **changes))
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(flat / "model.safetensors").keys()
