"""A plain LLaVA checkpoint in transformers' own classes: the same logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaOnevisionProcessor,
)

from llava import export_transformers
from llava.model.builder import load_pretrained_model
from llava.model.loading import load_config
from llava.model.multimodal_encoder.builder import checkpoint_image_processor, complete_vision_config
from tests.llava import tiny
from tests.llava.ranks import train_alone
from tests.llava.upstream import photo, save_release

NEXT = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[64, 32], [32, 64], [64, 64]],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, llm):
    """A function that lays a golden checkpoint of LLaVA's out as a release is."""

    def lay_out(name, **changes):
        return save_release(tmp_path_factory.mktemp("checkpoint") / name, name, llm, **changes)

    return lay_out


def our_logits(ours, row, inputs):
    """Of (1, T) ids with -200 for each of an image's tokens."""
    length = row.shape[1]
    packed = {name: value.tolist() for name, value in inputs.items() if name != "pixel_values"}
    return ours(
        row, cu_seqlens=[0, length], position_ids=torch.arange(length)[None], pixel_values=inputs["pixel_values"],
        image_sample=[0], **packed,
    ).logits  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("onevision", {}, "LlavaOnevisionForConditionalGeneration"),
        ("v15", {}, "LlavaForConditionalGeneration"),
        ("v15", NEXT, "LlavaNextForConditionalGeneration"),
    ],
)
@torch.no_grad()
def test_logits_and_pixels_stay_what_they_are(checkpoint, tmp_path, name, changes, expected):
    folder = checkpoint(name, **changes)
    export_transformers.main([str(folder), str(tmp_path / "out")])
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == expected
    _, ours, image_processor, _ = load_pretrained_model(str(folder), device="cpu")
    image = photo(700, 300) if name == "onevision" else photo(60, 31)
    inputs = image_processor([image])
    tokens = ours.get_model().tokens_per_image(inputs["image_grid_thw"], inputs["image_layout"])
    before, after = [5, 9], [17, 33, 2]
    row = torch.tensor([*before, *[-200] * tokens[0], *after])[None]
    logits = our_logits(ours, row, inputs)
    tiles = image_processor.tiles(image)
    is_cut = "image_aspect_ratio" in changes or name == "onevision"
    sizes = {"image_sizes": torch.tensor([[image.height, image.width]])} if is_cut else {}
    found = theirs(
        input_ids=row.masked_fill(row == -200, theirs.config.image_token_index),
        pixel_values=tiles[None] if is_cut else tiles,
        **sizes,
    ).logits
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=2e-5)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0] if is_cut else pixels, tiles, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "changes",
    [{}, {"image_aspect_ratio": "square"}, NEXT, {"mm_vision_select_feature": "cls_patch"}],
    ids=["pad", "square", "next", "cls_patch"],
)
@torch.no_grad()
def test_a_text_and_an_image_through_transformers_processor(checkpoint, tmp_path, changes):
    folder, out = checkpoint("v15", **changes), tmp_path / "out"
    export_transformers.export(str(folder), out)
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    image = photo(61, 30)
    read = processor(text="Look: <image> What?", images=image, return_tensors="pt")
    theirs = AutoModelForImageTextToText.from_pretrained(out).eval()
    _, ours, image_processor, _ = load_pretrained_model(str(folder), device="cpu")
    row = read["input_ids"].masked_fill(read["input_ids"] == theirs.config.image_token_index, -200)
    inputs = image_processor([image])
    assert (row == -200).sum() == ours.get_model().tokens_per_image(inputs["image_grid_thw"], inputs["image_layout"])[0]
    torch.testing.assert_close(theirs(**read).logits, our_logits(ours, row, inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(61, 30), (1500, 900), (2500, 2400)])
def test_onevision_processor_counts_an_images_tokens_as_the_model(checkpoint, tmp_path, size):
    """Its class cannot be made without torchvision, for its videos: here it is what its file says."""
    folder, out = checkpoint("onevision"), tmp_path / "out"
    export_transformers.export(str(folder), out)
    processor = object.__new__(LlavaOnevisionProcessor)
    vars(processor).update(json.loads((out / "processor_config.json").read_text()))
    processor.image_processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    read = dict(processor.image_processor(photo(*size), return_tensors="pt"))
    words = processor.replace_image_token(read | {"batch_num_images": [1]}, 0)
    config = load_config(str(folder))
    complete_vision_config(config)
    image_processor = checkpoint_image_processor(config)
    assert words == "<image>" * image_processor.num_visual_tokens(*size)


def test_the_words_for_an_image_are_tokens_that_the_model_has(checkpoint, tmp_path):
    export_transformers.export(str(checkpoint("v15")), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer.convert_tokens_to_ids("<image>") == config["image_token_index"] < config["text_config"]["vocab_size"]
    )


def test_a_native_tower_is_refused_with_the_page_that_helps(llm, siglip, data, tmp_path):
    train_alone(tiny.stage_arguments(llm, siglip, data, tmp_path / "run", **tiny.FULL_STAGE, max_steps=1))
    with pytest.raises(SystemExit, match=r"^error: .*comp-siglip.*no class.*docs/from_llava\.md"):
        export_transformers.main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"mm_patch_merge_type": "spatial"}, {"image_aspect_ratio": "pad"}])
def test_merging_that_transformers_has_not_is_refused(checkpoint, tmp_path, changes):
    with pytest.raises(ValueError, match="transformers has flat with one tile, and spatial_unpad with anyres"):
        export_transformers.export(str(checkpoint("v15", **(NEXT | changes))), tmp_path / "out")


def test_several_layers_side_by_side_are_refused(checkpoint, tmp_path):
    folder = checkpoint("v15", mm_vision_select_feature="slicefour_patch", mm_hidden_size=80)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.mm_projector.0.weight"] = tensors["model.mm_projector.0.weight"].repeat(1, 5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mm_vision_select_feature 'slicefour_patch'.*one layer"):
        export_transformers.export(str(folder), tmp_path / "out")


def test_a_config_without_the_layer_means_the_last_but_one(checkpoint, tmp_path):
    folder = checkpoint("v15")
    config = json.loads((folder / "config.json").read_text())
    del config["mm_vision_select_layer"]
    (folder / "config.json").write_text(json.dumps(config))
    export_transformers.export(str(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["vision_feature_layer"] == -2
