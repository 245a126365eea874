"""The shipped starting models: transformers loads them, they are small, and the tokenizer loses nothing."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2ForCausalLM, SiglipImageProcessorPil, SiglipVisionModel

import playground
from playground.corpus import END_OF_TEXT, TURN_END, TURN_START, training_texts
from playground.train_tokenizer import train_tokenizer

MODELS = Path(playground.__file__).parent / "models"
MAX_BYTES = 2_100_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "llm")


def test_tower_is_a_siglip_vision_model_without_its_head():
    tower, info = SiglipVisionModel.from_pretrained(MODELS / "tower", output_loading_info=True)
    assert not any(info.values()), info
    assert tower.config.model_type == "siglip_vision_model"
    processor = SiglipImageProcessorPil.from_pretrained(MODELS / "tower")
    pixels = processor(Image.new("RGB", (300, 100), "white"), return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(pixels, 1.0)
    with torch.no_grad():
        hidden = tower.float()(pixel_values=pixels).last_hidden_state
    assert hidden.shape == (1, 64, tower.config.hidden_size)
    assert torch.isfinite(hidden).all()


def test_llm_is_a_qwen2_that_answers_from_text(tokenizer):
    llm, info = Qwen2ForCausalLM.from_pretrained(MODELS / "llm", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert llm.config.tie_word_embeddings
    assert llm.config.vocab_size == len(tokenizer)
    prompt = (
        f"{TURN_START}system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.{TURN_END}\n"
        f"{TURN_START}user\nA document. name: Emma; city: Quito; sum: 83\nWhat is the city?{TURN_END}\n"
        f"{TURN_START}assistant\n"
    )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    answer = llm.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(answer[0, ids.shape[1] :]) == f"Quito{TURN_END}"


@pytest.mark.parametrize("part", ["tower", "llm"])
def test_weights_are_small(part):
    assert (MODELS / part / "model.safetensors").stat().st_size < MAX_BYTES


def test_specials_are_single_tokens(tokenizer):
    for special in (END_OF_TEXT, TURN_START, TURN_END):
        assert len(tokenizer(special)["input_ids"]) == 1
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"


def test_tokenizer_gives_every_text_back(tokenizer):
    texts = ["".join(piece for piece, _ in spans) for spans in itertools.islice(training_texts("round trip"), 50)]
    for text in [*texts, "naïve café, 12 345 €\n\n\t漢字 🙂"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone(tokenizer):
    assert len(tokenizer("1234")["input_ids"]) == 4


def test_shipped_tokenizer_is_the_one_its_script_trains(tokenizer):
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()
