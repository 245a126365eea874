"""LLaVA's own checkpoints load, and compute and say what LLaVA-NeXT at b42941c does (tests/data/upstream)."""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from llava.mm_utils import expand_placeholders
from llava.model.builder import load_pretrained_model
from llava.model.loading import load_config
from llava.model.multimodal_encoder.builder import VISION_TOWERS, checkpoint_image_processor, tower_factory
from llava.model.tile_inputs import tile_inputs
from tests.llava.upstream import GOLDEN, TOWERS, photo, save_release, wave

PROMPTS = [torch.tensor([5, 9, -200, 17, 33, 2]), torch.tensor([7, -200, 21, 3])]
INPUTS = {
    "v15": {
        "images": [wave(1, 3, 32, 32), wave(1, 3, 32, 32, step=0.11)],
        "image_sizes": [(32, 20), (10, 30)],
        "modalities": ["image", "image"],
    },
    "onevision": {
        "images": [wave(3, 3, 384, 384), wave(2, 3, 384, 384, step=0.11)],
        "image_sizes": [(700, 300), (384, 384)],
        "modalities": ["image", "video"],
    },
}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, llm):
    """The folders with a tokenizer, as a release has one, naming the tower where it lies here."""
    folders = {name: tmp_path_factory.mktemp("checkpoints") / name for name in TOWERS}
    for name, folder in folders.items():
        save_release(folder, name, llm)
    return folders


@pytest.fixture(scope="module")
def models(checkpoints):
    return {name: load_pretrained_model(str(folder), device="cpu") for name, folder in checkpoints.items()}


def packed(model, name):
    """Both prompts in one packed row, as training has them."""
    pixels, grids, layout = tile_inputs(model.get_vision_tower(), **INPUTS[name])
    tokens = model.get_model().tokens_per_image(grids, layout)
    rows = [expand_placeholders(prompt, None, [count])[0] for prompt, count in zip(PROMPTS, tokens, strict=True)]
    lengths = [len(row) for row in rows]
    return lengths, {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": [0, lengths[0], sum(lengths)],
        "pixel_values": pixels,
        "image_grid_thw": grids.tolist(),
        "image_layout": layout.tolist(),
        "image_sample": [0, 1],
    }


@pytest.mark.parametrize("name", INPUTS)
@torch.no_grad()
def test_packed_embeddings_and_logits_are_upstreams(models, name):
    _, model, _, _ = models[name]
    expected = load_file(GOLDEN / f"{name}.io.safetensors")
    lengths, batch = packed(model, name)
    assert lengths == expected["lengths"].tolist()
    embeddings, _ = model.embed_multimodal(
        batch["input_ids"], batch["pixel_values"], batch["image_grid_thw"], batch["image_layout"]
    )
    logits = model(**batch).logits
    for row, (found, scores) in enumerate(zip(embeddings[0].split(lengths), logits[0].split(lengths), strict=True)):
        every = max(1, lengths[row] // 40)
        torch.testing.assert_close(found[::every], expected[f"embeddings.{row}"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores[-6:], expected[f"logits.{row}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", INPUTS)
def test_generate_says_what_upstream_says_alone_and_in_a_batch(models, name):
    _, model, _, _ = models[name]
    expected = load_file(GOLDEN / f"{name}.io.safetensors")
    together = model.generate(PROMPTS, **INPUTS[name], **GREEDY)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt[None], **{key: [value[row]] for key, value in INPUTS[name].items()}, **GREEDY)
        assert alone[0].tolist() == expected[f"generated.{row}"].tolist()
        assert together[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("name", INPUTS)
def test_saved_back_it_has_the_same_keys_and_weights(models, checkpoints, name, tmp_path):
    _, model, _, _ = models[name]
    model.save_pretrained(tmp_path)
    before, after = load_file(checkpoints[name] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    unread = {key for key in before if key.endswith("position_ids")}
    assert before.keys() - unread == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)
    config = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((checkpoints[name] / "config.json").read_text())
    about_images = [key for key in original if key.startswith(("mm_", "image_"))]
    assert {key: config[key] for key in about_images} == {key: original[key] for key in about_images}


def test_siglip_keeps_26_of_27_layers_and_no_head(models, checkpoints):
    keys = load_file(checkpoints["onevision"] / "model.safetensors").keys()
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight" in keys
    with torch.device("meta"):
        tower = tower_factory("google/siglip-so400m-patch14-384").build_tower(
            "google/siglip-so400m-patch14-384",
            config=tower_factory("a/b").tower_config("google/siglip-so400m-patch14-384"),
        )
    names = {name for name, _ in tower.named_parameters()}
    assert {name.split(".")[4] for name in names if "layers" in name} == {str(number) for number in range(26)}
    assert not any("head" in name for name in names)
    assert "vision_tower.vision_model.post_layernorm.weight" in names
    assert (tower.hidden_size, tower.per_side, tower.num_layers) == (1152, 27, 26)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_copy_in_a_folder_of_any_name_is_told_by_its_config(checkpoints, models, tmp_path, tower):
    """LLaVA-NeXT takes every local folder for CLIP, and reads names for substrings."""
    name = {"clip": "v15", "siglip": "onevision"}[tower]
    folder = tmp_path / f"yi-mistral-{'siglip' if tower == 'clip' else 'openai'}-lora"
    shutil.copytree(checkpoints[name], folder)
    shutil.copytree(GOLDEN / tower, folder / "llama-siglip-clip")
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(folder / "llama-siglip-clip")
    (folder / "config.json").write_text(json.dumps(config))
    model = load_pretrained_model(str(folder), device="cpu")[1]
    assert model.get_vision_tower().config.model_type == f"{tower}_vision_model"
    arguments = {key: value[:1] for key, value in INPUTS[name].items()}
    ours, theirs = (each.generate(PROMPTS[0][None], **arguments, **GREEDY) for each in (model, models[name][1]))
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_pixels_are_upstreams_to_the_bit(name):
    with safe_open(GOLDEN / "pixels.safetensors", "pt") as file:
        for key in [key for key in list(file.keys()) if key.startswith(name)]:
            _, mode, size = key.split()
            config = tower_factory(f"x/{name}").tower_config(str(GOLDEN / name)) | {"image_size": 16, "patch_size": 8}
            processor = tower_factory(f"x/{name}").build_image_processor(
                f"x/{name}",
                config=config,
                image_aspect_ratio=mode,
                image_grid_pinpoints=[[16 * w, 16 * h] for w in range(1, 4) for h in range(1, 4)],
            )
            image = photo(*map(int, size.split("x")))
            expected = file.get_tensor(key)
            tiles = expected if expected.ndim == 4 else expected[None]
            assert torch.equal(processor.tiles(image), tiles), key
            assert len(processor([image])["pixel_values"]) == len(tiles) * 4


def test_every_way_to_name_a_tower_leads_to_its_family(tmp_path):
    assert {"clip", "siglip"} <= set(VISION_TOWERS.names())
    for name in (str(GOLDEN / "clip"), f"clip:{GOLDEN / 'clip'}", "openai/clip-vit-large-patch14-336"):
        assert tower_factory(name).tower_config(name)["model_type"] == "clip_vision_model"
    with pytest.raises(ValueError, match="the checkpoint is a siglip_vision_model"):
        tower_factory("clip:x").tower_config(f"clip:{GOLDEN / 'siglip'}")
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ValueError, match="has model_type 'dinov2'; a plain tower is one of clip, siglip"):
        tower_factory(str(tmp_path)).tower_config(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="overwrite_config"):
        tower_factory("/mnt/a/siglip").tower_config("/mnt/a/siglip")


def test_clip_features_of_each_kind():
    """Layers and the class token as LLaVA names them; of SigLIP always the last layer's patches."""
    clip = tower_factory("clip").tower_config(f"clip:{GOLDEN / 'clip'}") | {"num_hidden_layers": 7}
    shapes = {}
    for feature in ("patch", "cls_patch", "slicefour_patch"):
        tower = tower_factory("clip").build_tower("clip", config=clip, mm_vision_select_feature=feature)
        features = tower(torch.zeros(32, 192), [[2, 4, 4]])
        shapes[feature] = tuple(features.shape)
        assert features.shape[1] == tower.hidden_size
    assert shapes == {"patch": (32, 16), "cls_patch": (34, 16), "slicefour_patch": (32, 64)}
    with pytest.raises(ValueError, match="mm_vision_select_layer -9"):
        tower_factory("clip").build_tower("clip", config=clip, mm_vision_select_layer=-9)
    with pytest.raises(ValueError, match="mm_vision_select_feature 'mean' is unknown"):
        tower_factory("clip").build_tower("clip", config=clip, mm_vision_select_feature="mean")


def test_clips_own_pixels_are_read_and_kept(checkpoints, tmp_path):
    """A CLIP with mean, deviation and size of its own; the checkpoint knows them without the tower's folder."""
    shutil.copytree(GOLDEN / "clip", tmp_path / "tower")
    values = json.loads((tmp_path / "tower/preprocessor_config.json").read_text())
    values |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0], "size": {"shortest_edge": 40}}
    (tmp_path / "tower/preprocessor_config.json").write_text(json.dumps(values))
    _, model, processor, _ = load_pretrained_model(
        str(checkpoints["v15"]), device="cpu", overwrite_config={"mm_vision_tower": str(tmp_path / "tower")}
    )
    red = Image.new("RGB", (90, 60), (255, 51, 0))
    pixels = processor.preprocess(red)["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels[0, :, 5, 5], torch.tensor([1.8, 0.0, -0.3]))
    middle = photo(90, 60).resize((60, 40), Image.Resampling.BICUBIC).crop((14, 4, 46, 36))
    mean, std = torch.tensor(values["image_mean"]), torch.tensor(values["image_std"])
    expected = (torch.tensor(np.array(middle)) / 255 - mean) / std
    found = processor.preprocess(photo(90, 60))["pixel_values"][0].permute(1, 2, 0)
    torch.testing.assert_close(found, expected)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "tower")
    kept = checkpoint_image_processor(load_config(str(tmp_path / "saved")))
    assert torch.equal(kept.preprocess(red)["pixel_values"], pixels)


def test_a_tower_that_is_cut_to_another_size_than_it_reads_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "clip", tmp_path / "clip")
    (tmp_path / "clip/preprocessor_config.json").write_text('{"size": 224, "crop_size": 224}')
    with pytest.raises(ValueError, match="cuts images to 224 px, but its vision config has 32 px"):
        tower_factory("clip").processor_config(f"clip:{tmp_path / 'clip'}")


def test_only_the_layers_that_are_asked_for_are_kept():
    clip = tower_factory("clip").tower_config(f"clip:{GOLDEN / 'clip'}") | {"num_hidden_layers": 7}
    tower = tower_factory("clip").build_tower("clip", config=clip)
    layers = tower.vision_tower.vision_model.encoder.layers
    alive, before_last = [], []
    for layer in layers[:6]:
        layer.register_forward_hook(lambda *found: alive.append(weakref.ref(found[2])))
    layers[5].register_forward_pre_hook(lambda *_: before_last.extend(each() is not None for each in alive))
    with torch.no_grad():
        tower(torch.zeros(16, 192), [[1, 4, 4]])
    assert before_last == [False] * 4 + [True]


def test_options_of_native_towers_are_refused():
    with pytest.raises(ValueError, match="--use_rope True: an option of native towers"):
        tower_factory("clip").build_tower("clip", config={}, use_rope=True)


def test_a_batch_of_mixed_sizes_texts_and_several_images_is_each_one_alone(models):
    _, model, processor, _ = models["onevision"]
    prompts = [torch.tensor([5, -200, 9]), torch.tensor([7, 8, 9]), torch.tensor([3, -200, -200, 6])]
    pictures = [[photo(300, 420)], [], [photo(200, 100), photo(90, 60)]]
    inputs = [processor.for_sample(len(images))(images) for images in pictures]
    together = {key: torch.cat([each[key] for each in inputs]) for key in inputs[0]}
    batch = model.generate(prompts, **together, **GREEDY)
    for row, (prompt, own) in enumerate(zip(prompts, inputs, strict=True)):
        alone = model.generate(prompt[None], **(own if len(own["image_grid_thw"]) else {}), **GREEDY)
        assert batch[row].tolist() == alone[0].tolist()
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p)) for p in prompts], batch_first=True)
    assert model.generate(padded, attention_mask=mask, **together, **GREEDY).tolist() == batch.tolist()


@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
def test_several_images_are_padded_whatever_the_mode(mode):
    """As LLaVA's data set; one alone is treated as the mode says."""
    config = tower_factory("siglip").tower_config(str(GOLDEN / "siglip")) | {"image_size": 16, "patch_size": 8}
    make = tower_factory("siglip").build_image_processor
    padded = make("siglip", config=config, image_aspect_ratio="pad")
    processor = make("siglip", config=config, image_aspect_ratio=mode, image_grid_pinpoints=[[16, 32], [32, 16]])
    strips = [photo(40, 12), photo(9, 30)]
    found, expected = processor.for_sample(2)(strips), padded(strips)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    alone = processor.for_sample(1)(strips[:1])["pixel_values"]
    assert torch.equal(alone, processor(strips[:1])["pixel_values"])
    assert torch.equal(alone, padded(strips[:1])["pixel_values"]) == (mode == "pad")


def test_images_that_the_prompts_do_not_place_are_refused(models):
    """LLaVA-NeXT repeats the last image, or shifts those of later samples."""
    model = models["v15"][1]
    one = {key: value[:1] for key, value in INPUTS["v15"].items()}
    with pytest.raises(ValueError, match="the text holds 2 <image>, but there are 1"):
        model.generate(torch.tensor([[4, -200, -200]]), **one)
    with pytest.raises(ValueError, match=r"1 image\(s\) more than <image>"):
        model.generate(torch.tensor([[4, -200]]), **INPUTS["v15"])
    with pytest.raises(ValueError, match="found 2 images, 1 image_sizes and 2 modalities"):
        model.generate(torch.tensor([[4, -200, -200]]), **INPUTS["v15"] | {"image_sizes": [(1, 1)]})


def test_one_modality_holds_for_all_images_and_dummies_of_texts_are_left_out(models):
    """LLaVA-NeXT cuts a batch to as many samples as modalities are given; its text-only samples bring a zero image."""
    model = models["v15"][1]
    inputs = INPUTS["v15"]
    both = model.generate(PROMPTS, **inputs, **GREEDY)
    assert model.generate(PROMPTS, images=inputs["images"], modalities="image", **GREEDY).tolist() == both.tolist()
    dummies = [inputs["images"][0], torch.zeros(1, 3, 32, 32)]
    mixed = model.generate(
        [PROMPTS[0], torch.tensor([7, 8])],
        images=dummies,
        modalities=["image", "text"],
        image_sizes=[(32, 20)] * 2,
        **GREEDY,
    )
    assert mixed[0].tolist() == both[0].tolist()
