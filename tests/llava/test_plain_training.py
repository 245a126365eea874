"""A plain tower trains, saves and answers by the same commands as a native one."""

import json

import pytest
import torch

from llava.conversation import conv_templates
from llava.data.collator import PackedCollator
from llava.data.dataset import LLaVADataset
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import tower_factory
from llava.train.arguments import parse_arguments
from llava.train.train import build_stage, run_stage
from tests.llava import tiny
from tests.llava.test_data_video import write_video
from tests.llava.test_packed_model import forward, gradients
from tests.llava.upstream import photo

PINPOINTS = "[[32, 64], [64, 32], [64, 64]]"
FLAGS = {
    "mm_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "anyres_max_2",
    "image_grid_pinpoints": PINPOINTS,
    "mm_patch_merge_type": "spatial_unpad",
    "use_rope": None,
    "force_resize": None,
    "version": "qwen_2",
    "max_steps": 2,
}
ALL = "mm_vision_tower,mm_mlp_adapter,mm_language_model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, llm, siglip, data):
    """Two steps from a bare LLM, of every part."""
    output = tmp_path_factory.mktemp("plain") / "run"
    flags = {**FLAGS, "vision_tower": siglip, "mm_tunable_parts": ALL}
    stage = build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, output, **flags)))
    before = {name: value.clone() for name, value in stage[0].model.named_parameters()}
    run_stage(*stage)
    return output, before, stage[0].model


def test_every_part_learns_and_what_no_feature_comes_through_stays(trained):
    _, before, model = trained
    after = dict(model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.image_newline", "model.mm_projector.0.weight", "model.layers.0.mlp.up_proj.weight"} <= moved
    tower = "model.vision_tower.vision_tower.vision_model"
    assert {f"{tower}.embeddings.position_embedding.weight", f"{tower}.encoder.layers.0.mlp.fc1.weight"} <= moved
    unused = {name for name in after if "post_layernorm" in name}
    assert unused
    assert not any(after[name].requires_grad for name in unused)  # data-parallel training waits for every gradient


def test_the_saved_model_says_in_llavas_words_what_it_is_and_answers(trained, siglip):
    output, *_ = trained
    config = json.loads((output / "config.json").read_text())
    expected = {key: FLAGS[key] for key in FLAGS if key.startswith(("mm_", "image_"))} | {
        "mm_vision_tower": str(siglip),
        "mm_newline_position": "grid",  # of no flag: what LLaVA's training writes
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_spatial_pool_mode": "bilinear",
    }
    assert {key: config[key] for key in expected} == expected
    tokenizer, model, processor, _ = load_pretrained_model(str(output), device="cpu")
    inputs = processor([photo(90, 40)])
    ids = torch.tensor([[*tokenizer("a").input_ids, -200]])
    assert model.generate(ids, **inputs, max_new_tokens=3, pad_token_id=0).shape[0] == 1
    assert (
        processor.num_visual_tokens(90, 40)
        == model.get_model().tokens_per_image(inputs["image_grid_thw"], inputs["image_layout"])[0]
    )


def test_flags_change_the_mode_of_a_checkpoint_that_training_goes_on_from(trained, llm, siglip, data, tmp_path):
    output, *_ = trained
    changes = {**FLAGS, "vision_tower": None, "image_aspect_ratio": "pad", "image_grid_pinpoints": None}
    arguments = tiny.stage_arguments(output, siglip, data, tmp_path / "next", **changes)
    trainer, _ = build_stage(*parse_arguments(arguments))
    sample = trainer.train_dataset[0]
    assert sample["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert (sample["input_ids"] == -200).sum() == 17  # and a newline


def test_a_native_tower_says_which_flags_it_does_not_read(llm, siglip, data, tmp_path, caplog):
    flags = {**FLAGS, "mm_projector_type": None, "use_rope": True}
    build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path / "run", **flags)))
    unread = [record.message for record in caplog.records if "old scripts' sake" in record.message]
    assert any(message.startswith("--image_aspect_ratio is taken") for message in unread)
    assert len(unread) == 3


def test_a_native_tower_refuses_an_adapter_that_merges_nothing(llm, siglip, data, tmp_path):
    flags = {"mm_projector_type": "mlp2x_gelu"}
    with pytest.raises(ValueError, match=r"mlp2x_gelu keeps every patch, .* 2 x 2 patches each. Use downsample_mlp"):
        build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path / "run", **flags)))


def make_dataset(records, folder, **options):
    processor = tower_factory("siglip").build_image_processor(
        "siglip",
        config={"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        image_aspect_ratio="anyres",
        image_grid_pinpoints=PINPOINTS,
        mm_patch_merge_type="spatial_unpad",
        mm_newline_position="grid",
    )
    return LLaVADataset(records, image_processor=processor, image_folder=str(folder), model_max_length=4096, **options)


def test_one_image_is_cut_several_are_padded_and_a_video_is_one_placeholder(tmp_path, llm):
    """As LLaVA's data set: several images of a record are never cut into tiles."""
    from transformers import AutoTokenizer

    for name in ("a.png", "b.png"):
        photo(60, 30).save(tmp_path / name)
    clip = tmp_path / "clip"
    clip.mkdir()
    frames = [photo(20, 20), photo(20, 20)]
    records = [
        tiny.record("one", "a.png", "Yes."),
        tiny.record("two", ["a.png", "b.png"], "Yes."),
        tiny.record("none", None, "Yes."),
    ]
    records[1]["conversations"][0]["value"] = "<image>\n<image>\nSame?"
    dataset = make_dataset(
        records, tmp_path, tokenizer=AutoTokenizer.from_pretrained(llm), conversation=conv_templates["qwen_2"]
    )
    one, two, none = (dataset[index] for index in range(3))
    assert one["image_grid_thw"].tolist() == [[3, 4, 4]]
    assert one["image_layout"].tolist() == [[60, 30, 0]]
    assert (one["input_ids"] == -200).sum() == 16 + 4 * (8 + 1)
    assert two["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert (two["input_ids"] == -200).sum() == 2 * 17
    batch = PackedCollator(192)([one, none, two])
    assert batch["image_layout"] == [[60, 30, 0], [60, 30, 0], [60, 30, 0]]
    assert len(batch["pixel_values"]) == 5 * 16
    video = dataset.image_processor([frames])
    assert video["image_layout"].tolist() == [[20, 20, 1]]
    assert dataset.image_processor.num_video_tokens(2, 20, 20) == 2 * 2 * 3


def test_a_pack_with_a_video_has_the_losses_and_gradients_of_its_samples(llm, siglip, tmp_path):
    """One image, two of them, a video and text alone, of a plain tower; and the alignment loss on top."""
    data = tiny.save_data(tmp_path / "data", count=2)
    write_video(data / "images" / "a.mp4", 6)
    records = [
        tiny.record("one", "0.png", "Red."),
        tiny.record("two", ["0.png", "1.png"], "Red and green."),
        {**tiny.record("video", "a.mp4", "Brighter."), "video": "a.mp4"},
        tiny.record("text", None, "Blue."),
    ]
    records[1]["conversations"][0]["value"] = "<image><image>Which?"
    del records[2]["image"]
    (data / "data.json").write_text(json.dumps(records))
    flags = {**FLAGS, "vision_tower": siglip, "mm_tunable_parts": ALL, "video_frames": 3}
    flags |= {"use_alignment_loss": True, "word_prior": "uniform", "attn_implementation": "sdpa"}
    trainer, _ = build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path / "run", **flags)))
    model = trainer.model.train()
    samples = [trainer.train_dataset[index] for index in range(len(records))]
    assert samples[2]["image_grid_thw"].tolist() == [[3, 4, 4]]
    assert (samples[2]["input_ids"] == -200).sum() == 3 * 2 * 3  # pooled to 2 x 2, and a newline a row
    total = sum(int((sample["labels"] != -100).sum()) for sample in samples)
    aligned = forward(model, samples, num_items_in_batch=total)
    assert float(aligned.losses["alignment"].detach()) > 0
    weight = model.auxiliary_weights["alignment"]
    torch.testing.assert_close(aligned.loss, aligned.losses["decoding"] + weight * aligned.losses["alignment"])
    packed = aligned.losses["decoding"]
    packed.backward()
    expected = gradients(model)
    model.zero_grad()
    separate = sum(forward(model, [sample], num_items_in_batch=total).losses["decoding"] for sample in samples)
    separate.backward()
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * gradient.norm() + 1e-7, name
