"""Traps of LLaVA-NeXT's training code that no other test here is about."""

import copy

import pytest
from transformers import AutoTokenizer

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.data.encoding import ConversationEncoder
from tests.llava.data_parts import draw, make_dataset, make_record

# Qwen2.5's tokenizer has thirteen; LLaVA's training unpacks exactly two.
SPECIALS = ["<|im_start|>", "<|im_end|>", *(f"<|special_{number}|>" for number in range(11))]


@pytest.fixture
def tokenizer(llm):
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    return tokenizer


@pytest.mark.parametrize("label_mask", ["answers", "llava"])
def test_a_tokenizer_may_have_any_number_of_special_tokens_and_any_newline(tokenizer, label_mask):
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    assert len(newline) == 1
    assert newline != [198]  # the id that LLaVA's training takes for a newline
    conversation = conv_templates["qwen_2_5"].copy()
    conversation.append_message(conversation.roles[0], "One?\nTwo?")
    conversation.append_message(conversation.roles[1], "Three.")
    encoder = ConversationEncoder(tokenizer, conversation, label_mask=label_mask, max_length=1000)
    encoded = encoder(conversation, [])
    learnt = encoded.labels[encoded.labels != IGNORE_INDEX].tolist()
    assert (newline[0] in learnt) == (label_mask == "llava")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in learnt


def test_what_is_made_of_a_record_leaves_the_record_as_it_is(tmp_path):
    """LLaVA writes into the record that it keeps, so that a second epoch has other text."""
    record = make_record("What is <image>", "A square.", "And <image> that?", "Two.", image=["a.png", "b.png"])
    for name in record["image"]:
        draw(tmp_path, name)
    before = copy.deepcopy(record)
    dataset = make_dataset([record], tmp_path)
    first, second = dataset[0], dataset[0]
    assert record == before
    assert first["input_ids"].tolist() == second["input_ids"].tolist()
