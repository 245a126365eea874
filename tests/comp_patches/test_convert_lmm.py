"""The authors' CoMP-MM, converted, computes the numbers of their code: positions, visual tokens, logits, loss."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from comp_patches.commands import convert
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.inference import prompt_ids
from llava.model.builder import load_pretrained_model
from tests.comp_patches.conftest import DATA

WORDS = {28: "<|im_start|>", 29: "<|im_end|>", 55: "<|vision_start|>", 56: "<|vision_end|>", 57: "<|image_pad|>"}


@pytest.fixture
def released(tmp_path):
    """The golden model as the authors' folder, and beside it the vision model that its config names."""
    golden = json.loads((DATA / "lmm_tiny.config.json").read_text())
    llm, vision = golden["llm"], golden["vision"]
    section = llm.pop("mrope_section")
    folder, original = tmp_path / "released", tmp_path / "original"
    folder.mkdir()
    original.mkdir()
    # The golden numbers come from a module that was never cast to bfloat16.
    siglip = {"model_type": "siglip", "vision_config": vision | {"rope_dtype": "float32"}}
    (original / "config.json").write_text(json.dumps(siglip))
    config = llm | {
        "architectures": ["SliMMForConditionalGeneration"],
        "model_type": "qwen2",
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": section},
        "use_rope": True,
        "custom_visual_model": str(original),
        "mm_tunable_parts": "mm_mlp_adapter",
    }
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "min_pixels": 3136, "max_pixels": 6 * 784}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tensors = {key: tensor.float() for key, tensor in load_file(DATA / "lmm_tiny.weights.safetensors").items()}
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "vocab_dist": torch.ones(61, 1)}
    save_file(tensors, folder / "model.safetensors")
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder):
    vocabulary = {WORDS.get(number, f"w{number}"): number for number in range(61)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(WORDS.values()))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)


@pytest.fixture
def converted(released, tmp_path):
    convert.run(str(released), tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def golden_batch(golden):
    """The golden samples as one packed row, without padding, and what of (B, L) it is."""
    io = golden("lmm_tiny.io")
    real = io["in/attention_mask"].bool()
    ids = io["in/input_ids"][real]
    labels = io["in/labels"].masked_fill(torch.arange(17) == 0, -100)[real]
    lengths = real.sum(1).tolist()
    batch = {
        "input_ids": ids.masked_fill(ids == 57, IMAGE_TOKEN_INDEX)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": [0, lengths[0], sum(lengths)],
        "pixel_values": io["in/pixel_values_x32_int8"].float() / 32,
        "image_grid_thw": io["in/image_grid_thw"].tolist(),
        "image_sample": [0, 1],
    }
    return io, real, batch, labels[None]


def test_positions_tokens_logits_and_loss_are_the_released_ones(converted, golden_batch):
    io, real, batch, labels = golden_batch
    _, model, _, _ = load_pretrained_model(str(converted), device="cpu")
    positions = model.get_model().row_positions(batch["input_ids"], batch["image_grid_thw"], batch["cu_seqlens"])
    assert torch.equal(positions[:, 0], io["out/position_ids"][:, real])
    tokens = model.get_model().encode_images(batch["pixel_values"], batch["image_grid_thw"])
    torch.testing.assert_close(tokens, io["out/image_tokens"], rtol=0, atol=5e-5)
    logits = model(**batch).logits[0]
    torch.testing.assert_close(logits, io["out/logits"][real], rtol=1e-5, atol=1e-4)
    loss = model(**batch, labels=labels).losses["decoding"]
    torch.testing.assert_close(loss, io["out/loss_dec"][0], rtol=1e-5, atol=1e-6)


def test_without_mrope_it_computes_what_theirs_does_without(released, tmp_path, golden_batch):
    config = json.loads((released / "config.json").read_text())
    (released / "config.json").write_text(json.dumps(config | {"use_mrope": False}))
    convert.run(str(released), tmp_path / "ours")
    io, real, batch, _ = golden_batch
    _, model, _, _ = load_pretrained_model(str(tmp_path / "ours"), device="cpu")
    torch.testing.assert_close(model(**batch).logits[0], io["out/logits_no_mrope"][real], rtol=1e-5, atol=1e-4)


def test_generation_continues_as_a_packed_row_would(converted, golden_batch):
    """Prompts of two lengths, one of which ends with its image, padded together: the row's scores at each step."""
    _, _, batch, _ = golden_batch
    _, model, _, _ = load_pretrained_model(str(converted), device="cpu")
    image = torch.tensor([IMAGE_TOKEN_INDEX])
    prompts = [
        torch.cat((torch.tensor([28, 17, 55]), image)),
        torch.cat((torch.tensor([21]), image, torch.tensor([7]))),
    ]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 60}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    images = {"pixel_values": batch["pixel_values"], "image_grid_thw": torch.tensor(batch["image_grid_thw"])}
    together = model.generate(prompts, **images, **options)
    patches = batch["pixel_values"].split([16, 12])
    scores = torch.stack(together.logits, dim=1)
    parts = zip(prompts, [4, 3], patches, batch["image_grid_thw"], together.sequences, scores, strict=True)
    for prompt, tokens, pixels, grid, found, found_scores in parts:
        row = torch.cat([image.repeat(tokens) if id == IMAGE_TOKEN_INDEX else id[None] for id in prompt])
        for step in range(4):
            one = {"pixel_values": pixels, "image_grid_thw": [grid], "image_sample": [0]}
            positions = torch.arange(len(row))[None]
            logits = model(row[None], cu_seqlens=[0, len(row)], position_ids=positions, **one).logits[0, -1]
            torch.testing.assert_close(found_scores[step], logits, rtol=1e-4, atol=1e-4)
            row = torch.cat((row, found[step][None]))


def test_images_come_before_the_words_between_the_marks(converted):
    tokenizer, model, processor, _ = load_pretrained_model(str(converted), device="cpu")
    conversation = conv_templates[model.config.mm_conversation_template].copy()
    conversation.append_message(conversation.roles[0], "<image>\nw5 w6 <image>")
    text = conversation.turns()[1][0].text
    marked = "<|vision_start|><image><|vision_end|>"
    assert text == f"<|im_start|>user\n{marked}{marked}w5 w6 <|im_end|>\n"
    ids = prompt_ids(conversation, tokenizer).tolist()
    place = ids.index(55)
    assert ids[place : place + 6] == [55, IMAGE_TOKEN_INDEX, 56] * 2
    assert (processor.two_step_resize, processor.min_num_vistoken, processor.max_num_vistoken) == (True, 4, 6)
    assert processor.image_mean == (0.1, 0.2, 0.3)


def test_a_vision_model_elsewhere_is_named_by_a_flag(released, tmp_path):
    (tmp_path / "original").rename(tmp_path / "moved")
    with pytest.raises(SystemExit, match=r"^error: .*original.*--vision-model says where it is") as stopped:
        convert.main([str(released), str(tmp_path / "ours")])
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "ours").exists()
    convert.main([str(released), str(tmp_path / "ours"), "--vision-model", str(tmp_path / "moved")])
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["mm_vision_tower"] == f"comp-siglip:{tmp_path / 'moved'}"


def test_tensors_that_do_not_fit_the_config_are_named(released, tmp_path):
    tensors = load_file(released / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, released / "model.safetensors")
    with pytest.raises(ValueError, match=r"2 of \d+ tensors do not fit.*layers\.0\.mlp\.up_proj\.weight: missing in"):
        convert.run(str(released), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
