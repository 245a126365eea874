"""The packed LLaVA model: samples of a row are islands, images land in their places, the loss is the plain one."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2ForCausalLM

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.collator import PackedCollator
from llava.data.dataset import LLaVADataset
from llava.data.mixture import load_records
from llava.mm_utils import tokenizer_image_token
from llava.model import decoding_loss
from llava.model.auxiliary_losses.builder import build_auxiliary_loss
from llava.model.multimodal_encoder.builder import checkpoint_image_processor
from llava.train.arguments import parse_arguments
from llava.train.train import load_model
from tests.llava import tiny

PATCH_DIM = 3 * 8 * 8


def fresh_model(llm, siglip, data, tmp_path):
    arguments = tiny.stage_arguments(
        llm, siglip, data, tmp_path, **tiny.FULL_STAGE, force_resize="none", attn_implementation="sdpa"
    )
    torch.manual_seed(0)
    return load_model(*parse_arguments(arguments)).train()


@pytest.fixture
def model(llm, siglip, data, tmp_path):
    return fresh_model(llm, siglip, data, tmp_path)


@pytest.fixture
def samples(model, llm, data):
    dataset = LLaVADataset(
        load_records(data / "data.json"),
        tokenizer=AutoTokenizer.from_pretrained(llm),
        image_processor=checkpoint_image_processor(model.config),
        image_folder=str(data / "images"),
        conversation=conv_templates["qwen_2_5"],
        model_max_length=512,
        align_text=True,
    )
    return [dataset[index] for index in range(5)]


def forward(model, samples, **kwargs):
    batch = PackedCollator(PATCH_DIM)(samples)
    del batch["ids"], batch["bad_samples"], batch["num_samples"]
    return model(**batch, **kwargs)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def mix(samples):
    """Samples as a pack has them: of one image and of two, of text alone, short and long."""
    ids = samples[3]["input_ids"]
    words = ids[ids != IMAGE_TOKEN_INDEX]
    two = {
        key: torch.cat([samples[4][key], samples[1][key]])
        for key in ("input_ids", "labels", "pixel_values", "image_grid_thw", "align_input_ids")
    }
    return [samples[0], text_sample(words), two | {"id": "two"}, text_sample(words[:5]), samples[2]]


def text_sample(ids):
    return {
        "id": "text",
        "input_ids": ids,
        "labels": ids.clone().index_fill(0, torch.tensor([0]), IGNORE_INDEX),
        "pixel_values": torch.zeros(0, PATCH_DIM),
        "image_grid_thw": torch.zeros(0, 3, dtype=torch.long),
        "align_input_ids": ids,
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-7)])
def test_packed_samples_have_the_loss_and_gradients_of_separate_runs(model, mix, dtype, tolerance):
    """Summed over samples, since each run divides by the same number of supervised tokens."""
    model.to(dtype)
    total = sum(int((sample["labels"] != IGNORE_INDEX).sum()) for sample in mix)
    packed = forward(model, mix, num_items_in_batch=total)
    packed.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    separate = [forward(model, [sample], num_items_in_batch=total).loss for sample in mix]
    sum(separate).backward()
    torch.testing.assert_close(packed.loss, sum(separate), rtol=tolerance / 10, atol=tolerance / 100)
    assert expected.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() <= tolerance * gradient.norm() + tolerance / 1000, name


@pytest.mark.parametrize("changed", range(5))
def test_changing_one_sample_leaves_the_logits_of_the_others_alone(model, mix, changed):
    """Its text, and where it has images, their pixels; and that it comes out differently itself."""
    model.eval()
    other = dict(mix[changed])
    words = other["input_ids"] != IMAGE_TOKEN_INDEX
    other["input_ids"] = torch.where(words, other["input_ids"].flip(0).clamp(min=0), IMAGE_TOKEN_INDEX)
    other["pixel_values"] = -other["pixel_values"]
    before = logits_of_samples(model, mix)
    after = logits_of_samples(model, [*mix[:changed], other, *mix[changed + 1 :]])
    for number, (was, now) in enumerate(zip(before, after, strict=True)):
        if number == changed:
            assert (was - now).abs().max() > 1e-3
        else:
            torch.testing.assert_close(now, was, rtol=0, atol=1e-6)


def test_another_sample_of_another_length_leaves_the_logits_of_the_others_alone(model, mix, samples):
    model.eval()
    before = logits_of_samples(model, mix)
    after = logits_of_samples(model, [mix[0], samples[3], *mix[2:]])
    for number in (0, 2, 3, 4):
        torch.testing.assert_close(after[number], before[number], rtol=0, atol=1e-6)


def logits_of_samples(model, samples):
    logits = forward_logits(model, samples)[0]
    return logits.split([len(sample["input_ids"]) for sample in samples])


def forward_logits(model, samples):
    batch = PackedCollator(PATCH_DIM)(samples)
    for key in ("ids", "bad_samples", "num_samples", "labels"):
        del batch[key]
    return model(**batch).logits


def test_a_text_only_sample_is_what_transformers_computes(model, samples, llm):
    """The bare LLM inside, through packed attention, equals transformers' own Qwen2 with its own loss."""
    ids = samples[0]["input_ids"]
    ids = ids[ids != IMAGE_TOKEN_INDEX]
    reference = Qwen2ForCausalLM.from_pretrained(llm)
    expected = reference(input_ids=ids[None], labels=ids[None]).loss
    torch.testing.assert_close(forward(model, [text_sample(ids)]).loss, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_without_images_runs_the_tower_and_gives_it_zero_gradient(model, samples):
    forward(model, [text_sample(torch.arange(5))]).loss.backward()
    tower = [p for name, p in model.named_parameters() if "vision_tower" in name or "mm_projector" in name]
    assert all(p.grad is not None and not p.grad.any() for p in tower)


def test_placeholders_and_visual_tokens_that_differ_are_refused_with_both_numbers(model, samples):
    batch = PackedCollator(PATCH_DIM)([samples[0]])
    batch["input_ids"][batch["input_ids"] == IMAGE_TOKEN_INDEX] = 5
    with pytest.raises(ValueError, match=r"0 places for visual tokens.*give 12"):
        model.embed_multimodal(batch["input_ids"], batch["pixel_values"], batch["image_grid_thw"])


def test_the_loss_and_every_gradient_are_those_of_the_logits(model, samples, monkeypatch):
    """In chunks of a few tokens, through word embeddings that are input and head at once."""
    monkeypatch.setattr(decoding_loss, "ROWS_PER_CHUNK", 4)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    labels = PackedCollator(PATCH_DIM)(samples)["labels"]
    loss = forward(model, samples).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    logits = forward_logits(model, samples)[0, :-1]
    expected = F.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE_INDEX)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)


def test_the_alignment_loss_moves_tower_and_adapter_but_neither_llm_nor_word_embeddings(model, samples, tmp_path):
    prior = tiny.save_prior(tmp_path / "prior.safetensors")
    model.add_auxiliary_loss("alignment", build_auxiliary_loss("alignment", prior=str(prior)), weight=0.05)
    outputs = forward(model, samples)
    torch.testing.assert_close(outputs.loss, outputs.losses["decoding"] + 0.05 * outputs.losses["alignment"])
    outputs.losses["alignment"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("vision_tower" in name for name in moved)
    assert any("mm_projector" in name for name in moved)
    assert all("vision_tower" in name or "mm_projector" in name for name in moved)


class Onlooker(torch.nn.Module):
    """An auxiliary loss of nothing, which remembers what it was given."""

    def forward(self, visual_tokens, visual_sample, text_features, text_valid, word_embeddings, num_samples):
        self.seen = {"sample": visual_sample.tolist(), "words": word_embeddings, "samples": num_samples}
        self.text, self.text_valid = text_features, text_valid
        return {"onlooker": 0.0 * visual_tokens.sum()}


def test_an_auxiliary_loss_is_told_whose_each_visual_token_is_and_the_words_that_the_llm_says(
    siglip, data, samples, tmp_path
):
    """Of an LLM with two tables of words: the output one. And in training only."""
    untied = fresh_model(tiny.save_llm(tmp_path / "untied", tie=False), siglip, data, tmp_path)
    onlooker = Onlooker()
    untied.add_auxiliary_loss("onlooker", onlooker, weight=1.0)
    assert forward(untied, samples).losses.keys() == {"decoding", "onlooker"}
    tokens = [int((sample["input_ids"] == IMAGE_TOKEN_INDEX).sum()) for sample in samples]
    assert onlooker.seen["sample"] == [number for number, count in enumerate(tokens) for _ in range(count)]
    assert onlooker.seen["samples"] == len(samples)
    assert onlooker.seen["words"] is untied.lm_head.weight
    assert onlooker.text.any()
    assert not onlooker.text.requires_grad
    assert forward(untied.eval(), samples).losses.keys() == {"decoding"}


def test_a_batch_whose_answers_have_no_token_still_runs_the_llm_over_them(model, samples):
    """Every rank must, or the collectives of sharded weights never meet."""
    onlooker, runs = Onlooker(), []
    model.add_auxiliary_loss("onlooker", onlooker, weight=1.0)
    model.get_model().register_forward_hook(lambda *_: runs.append(None))
    forward(model, [sample | {"align_input_ids": torch.zeros(0, dtype=torch.long)} for sample in samples])
    assert len(runs) == 2
    assert not onlooker.text.any()
    assert not onlooker.text_valid.any()


def test_text_features_are_the_mean_hidden_state_of_the_answers_read_alone(model, samples, llm):
    batch = PackedCollator(PATCH_DIM)(samples)
    stream = {key: value for key, value in batch.items() if key.startswith("align_")}
    for layer in model.get_model().layers:
        layer.self_attn.attention_dropout = 0.5  # of training, not of the text that an image is compared with
    features, valid = model.text_features(len(samples), **stream)
    reference = Qwen2ForCausalLM.from_pretrained(llm).model
    assert valid.all()
    for feature, sample in zip(features, samples, strict=True):
        expected = reference(input_ids=sample["align_input_ids"][None]).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)
    assert model.training


def test_gradient_checkpointing_changes_nothing(model, samples):
    forward(model, samples).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable()
    assert model.get_vision_tower().vision_tower.gradient_checkpointing
    forward(model, samples).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_batched_generation_equals_one_by_one(model, llm, data):
    """Images of several sizes, a prompt without one, and one with two; what comes back is the answers alone."""
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(llm)
    processor = checkpoint_image_processor(model.config)
    images = [[Image.open(data / "images" / f"{index}.png") for index in row] for row in ((0,), (1,), (), (2, 3))]
    prompts = ["<image>" * len(row) + "Which colour? " * count for count, row in zip((1, 4, 3, 2), images, strict=True)]
    rows = [tokenizer_image_token(prompt, tokenizer, return_tensors="pt") for prompt in prompts]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(rows, **pixels(processor, [image for row in images for image in row]), **options)
    assert together.shape == (4, 6)
    for row, own, expected in zip(rows, images, together, strict=True):
        alone = model.generate([row], **(pixels(processor, own) if own else {}), **options)[0]
        assert alone.tolist() == expected.tolist()


def pixels(processor, images):
    return {key: processor(images)[key] for key in ("pixel_values", "image_grid_thw")}


def test_more_images_than_placeholders_are_refused(model, llm, data):
    processor = checkpoint_image_processor(model.config)
    images = [Image.open(data / "images" / "0.png")] * 2
    row = tokenizer_image_token("<image>", AutoTokenizer.from_pretrained(llm), return_tensors="pt")
    with pytest.raises(ValueError, match="1 image"):
        model.generate([row], **pixels(processor, images), max_new_tokens=1)
