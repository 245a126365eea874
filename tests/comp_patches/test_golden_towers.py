"""Both released towers give the released code's own numbers: every output that is stored, by the key's own words."""

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from comp_patches import layers
from comp_patches.attention import packed_attention
from comp_patches.families.comp_release import load_adapter
from comp_patches.packing import frames_on_host, patch_coordinates
from comp_patches.towers import load_vision_config, load_vision_transformer
from tests.comp_patches.conftest import DATA

GRIDS = [[1, 4, 4], [1, 6, 4], [1, 2, 10], [1, 8, 8]]
INPUTS = {
    "siglip_d12": "inputs_p14",
    "siglip_d72": "inputs_p2",
    "dinov2_d12": "inputs_p4",
    "dinov2_swiglu": "inputs_p2",
}


def outputs(name):
    with safe_open(DATA / f"{name}.io.safetensors", framework="pt") as file:
        return [key for key in file.keys() if key.startswith("out/")]  # noqa: SIM118, it is no dict


@pytest.fixture
def released(golden_checkpoint):
    """A function that lays a golden tower out as the authors' folder."""

    def lay_out(name, **config):
        architecture = "CoMPSiglipVisionModel" if "siglip" in name else "CoMPDinov2Model"
        return str(golden_checkpoint(name, architectures=[architecture], **config))

    return lay_out


@pytest.fixture
def inputs(golden):
    """A function from a tower's name to the packed patches and the grids that it was given."""

    def read(name):
        stored = golden(INPUTS[name])
        grids = stored["grid_thw"].tolist()
        assert grids == GRIDS[: len(grids)]
        scaled = stored.get("pixel_values_x32_int8")
        return (stored["pixel_values"].float() if scaled is None else scaled.float() / 32), grids

    return read


def attention_rounded_to_bf16(query, key, value, segments, **options):
    """What the released DINOv2 does in float32 models too."""
    rounded = (states.bfloat16().float() for states in (query, key, value))
    return packed_attention(*rounded, segments, **options).bfloat16().float()


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in INPUTS for key in outputs(name)])
def test_every_stored_output(golden, released, inputs, monkeypatch, name, key):
    words = key.removeprefix("out/").split("_")
    folder = released(name, use_rope="rope1" in words)
    tower = load_vision_transformer(
        folder,
        rope_dtype="float32",  # the stored numbers are a float32 model's
        position_embedding_order="block" if "blockpe" in words else None,
        position_interpolation="bilinear" if "bilinear" in words else None,
    )
    if "bf16attn" in words:
        monkeypatch.setattr(layers, "packed_attention", attention_rounded_to_bf16)
    features = tower(*inputs(name))
    if "merger1" in words:
        features = load_adapter(folder)(features)
    assert_close(features, golden(f"{name}.io")[key], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", INPUTS)
def test_embeddings_and_angles(golden, released, inputs, name):
    tower = load_vision_transformer(released(name), rope_dtype="float32")
    pixels, grids = inputs(name)
    stored = golden(f"{name}.io")
    frames = frames_on_host(grids)
    assert_close(tower.embed(pixels, frames)[0], stored["mid/embeddings"], atol=5e-5, rtol=0)
    cos, sin = tower.rotary_tables(patch_coordinates(frames, 2))
    assert_close(cos, stored["mid/rotary_angles"].cos(), atol=5e-5, rtol=0)
    assert_close(sin, stored["mid/rotary_angles"].sin(), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", INPUTS)
def test_each_image_alone_gives_what_the_batch_gave(golden, released, inputs, name):
    tower = load_vision_transformer(released(name), rope_dtype="float32")
    pixels, grids = inputs(name)
    sizes = [rows * cols for _, rows, cols in grids]
    stored = golden(f"{name}.io")["out/rope1_merger0"].split(sizes)
    for grid, patches, expected in zip(grids, pixels.split(sizes), stored, strict=True):
        assert_close(tower(patches, [grid]), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["siglip_d12", "dinov2_d12"])
def test_released_weights_remember_how_they_were_trained(released, name):
    config = load_vision_config(released(name))
    assert (config.position_embedding_order, config.position_interpolation) == ("raster", "bicubic")
    assert (config.rope_dtype, config.use_rope, config.merge_size) == ("bfloat16", True, 2)
    assert (config.class_token, config.final_norm) == (False, name == "dinov2_d12")


def test_a_tower_without_an_adapter_says_so(released):
    with pytest.raises(ValueError, match=r"siglip_d72 holds no adapter: it lacks merger.ln_q.weight"):
        load_adapter(released("siglip_d72"))


def test_an_adapter_keeps_its_dtype_and_trains(released):
    adapter = load_adapter(released("dinov2_d12"))
    adapter(torch.ones(8, 24)).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
