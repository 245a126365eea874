"""The shipped starting models: transformers loads them, they are small, and the tokenizer loses nothing."""

import contextlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2ForCausalLM, SiglipImageProcessorPil, SiglipVisionModel

import playground
from playground import mosaic
from playground.corpus import END_OF_TEXT, TURN_END, TURN_START, training_texts
from playground.pretraining import pretrain
from playground.words import COLOURS, FIELDS

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


def test_every_word_of_the_pictures_is_one_token(tokenizer):
    words = [word for values in FIELDS.values() if values for word in values] + list(COLOURS)
    for word in words:
        assert len(tokenizer(word)["input_ids"]) == 1, word
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word


def test_block_order_sorts_patches_by_the_adapter_s_blocks():
    """The first block is the two patches of two rows at the top left, the second the one to its right."""
    order = mosaic.patch_order("block").tolist()
    assert order[:8] == [0, 1, 8, 9, 2, 3, 10, 11]
    assert sorted(order) == list(range(64))
    assert set(mosaic.patch_order("cell")[:8].tolist()) == set(order[:8])


def test_inked_blocks_are_those_with_a_drawing():
    pixels = torch.ones(1, 3, 128, 128)
    pixels[0, :, 40, 100] = -1.0  # row 1 of cells, right column, right block
    assert mosaic.inked_blocks(pixels).nonzero().tolist() == [[7]]


def test_interrupted_pretraining_ends_as_an_uninterrupted_one(tmp_path):
    def run(checkpoint, *lengths):
        for steps in lengths:
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 1)
            batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(step)) for step in range(6)]

            def loss_of_step(step, model=model, batches=batches, steps=steps):
                if step == steps:
                    raise KeyboardInterrupt
                return model(batches[step]).square().mean()

            with contextlib.suppress(KeyboardInterrupt):
                pretrain(model, loss_of_step, checkpoint, steps=6, peak=0.1, warmup=2, save_every=1)
        return model.weight.detach()

    torch.testing.assert_close(run(tmp_path / "whole.pt", 6), run(tmp_path / "cut.pt", 3, 6), rtol=0, atol=0)
