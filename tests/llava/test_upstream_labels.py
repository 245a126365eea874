"""Prompts, ids and `--label_mask llava` of every template, token by token as LLaVA-NeXT's `preprocess` has them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.data.encoding import ConversationEncoder
from llava.data.records import build_conversation
from llava.inference import get_template, prompt_ids
from llava.spans import tokenize_whole
from tests.llava.data_parts import make_record
from tests.llava.upstream import GOLDEN, golden

FOUND = golden("labels.json")
CONVERSATIONS = FOUND["conversations"]
# LLaVA-NeXT counts tokens to find the answers; in these templates its count is wrong after the first exchange, or
# (mpt, without BOS) always, and then it masks the whole sample or the wrong tokens.
MISCOUNTED = {"mistral_instruct": {1, 2, 3}, "mpt": {0, 1, 2, 3}, "chatml_direct": {0, 1, 2, 3}}
KINDS = {name: found["tokenizer"] for name, found in FOUND["labels"].items()}


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: PreTrainedTokenizerFast.from_pretrained(GOLDEN / f"tokenizer_{kind}") for kind in set(KINDS.values())}


@pytest.mark.parametrize("name", [name for name in FOUND["prompts"] if name in conv_templates])
def test_prompts_are_upstreams(name):
    texts = iter(FOUND["prompts"][name])
    for turns in CONVERSATIONS:
        for messages in (turns, [*turns[:-1], None]):
            conversation = get_template(name)
            for index, text in enumerate(messages):
                conversation.append_message(conversation.roles[index % 2], text)
            expected = next(texts)
            if messages[-1] is not None and conversation.sep_style is SeparatorStyle.LLAMA_3:
                continue  # there upstream opens another answer after the last
            assert conversation.get_prompt() == expected


def encode(name, turns, tokenizer, label_mask):
    template = conv_templates[name]
    encoder = ConversationEncoder(tokenizer, template, label_mask=label_mask, max_length=10**6)
    conversation = build_conversation(make_record(*turns), template)
    return encoder(conversation, [1] * sum(text.count("<image>") for text in turns))


@pytest.mark.parametrize("name", FOUND["labels"])
def test_ids_and_llavas_labels_are_upstreams(name, tokenizers):
    for number, (turns, row) in enumerate(zip(CONVERSATIONS, FOUND["labels"][name]["rows"], strict=True)):
        if row is None:
            continue
        encoded = encode(name, turns, tokenizers[KINDS[name]], "llava")
        assert encoded.input_ids.tolist() == row[0], turns
        if number not in MISCOUNTED.get(name, ()):
            assert encoded.labels[1:].tolist() == row[1][1:], turns


@pytest.mark.parametrize("name", MISCOUNTED)
def test_where_llava_miscounts_its_mask_here_is_that_of_the_answers(name, tokenizers):
    """Of mpt, chatml_direct and, from the second exchange, mistral_instruct."""
    for number in MISCOUNTED[name]:
        if FOUND["labels"][name]["rows"][number] is not None:
            ours, answers = (
                encode(name, CONVERSATIONS[number], tokenizers[KINDS[name]], mask) for mask in ("llava", "answers")
            )
            assert ours.labels.tolist() == answers.labels.tolist(), number
            assert (ours.labels != IGNORE_INDEX).any()


@pytest.mark.parametrize("name", FOUND["labels"])
def test_answers_alone_are_learned_by_default(name, tokenizers):
    tokenizer = tokenizers[KINDS[name]]
    turns = CONVERSATIONS[0] if name == "plain" else CONVERSATIONS[1]
    encoded = encode(name, turns, tokenizer, "answers")
    learned = tokenizer.decode(encoded.labels[encoded.labels != IGNORE_INDEX], clean_up_tokenization_spaces=False)
    end = conv_templates[name].stop_str
    assert [text.strip() for text in learned.split(end)] == [*(text.strip() for text in turns[1::2]), ""]


@pytest.mark.parametrize("name", FOUND["labels"])
def test_a_prompt_is_how_its_training_ids_begin(name, tokenizers):
    """Served as trained, also in the second question."""
    tokenizer = tokenizers[KINDS[name]]
    turns = CONVERSATIONS[0] if name == "plain" else CONVERSATIONS[3]
    trained = encode(name, turns, tokenizer, "answers")
    conversation = build_conversation(make_record(*turns), conv_templates[name])
    conversation.messages[-1][1] = None
    asked = prompt_ids(conversation, tokenizer)
    assert torch.equal(trained.input_ids[: len(asked)], asked)
    assert trained.labels[len(asked)] != IGNORE_INDEX


def test_no_template_needs_a_network_or_a_tokenizer():
    """LLaVA-NeXT loads Llama 3's tokenizer when the module is imported, and its copy() loses it."""
    conversation = conv_templates["llava_llama_3"].copy()
    conversation.append_message("user", " Hi ")
    conversation.append_message("assistant", None)
    assert conversation.get_prompt().endswith("\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_question_that_begins_with_the_separators_characters_keeps_them():
    """LLaVA-NeXT strips the separator's characters from the left of a LLaMA-2 prompt."""
    conversation = get_template("mistral_instruct")
    conversation.append_message("USER", "<s>ss")
    assert conversation.get_prompt() == "[INST] <s>ss [/INST]"


def test_every_template_takes_a_system_message_or_has_none():
    for name in conv_templates:
        conversation = get_template(name)
        conversation.set_system_message("Be brief.")
        conversation.append_message(conversation.roles[0], "Hi")
        expected = conversation.sep_style not in (SeparatorStyle.PLAIN, SeparatorStyle.GEMMA)
        assert ("Be brief." in conversation.get_prompt()) == expected, name


def test_a_tokenizer_without_places_is_refused():
    conversation = get_template("v1")
    conversation.append_message("USER", "Hi")
    with pytest.raises(ValueError, match="use_fast=True"):
        tokenize_whole(conversation.turns(), SimpleNamespace(is_fast=False))
