"""Templates render as LLaVA's do, and their spans say what is what."""

import pytest

from llava.conversation import Part, conv_templates

QWEN_2_5_PROMPT = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\nA cat.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def talk(name: str, *texts: str | None):
    conversation = conv_templates[name].copy()
    for index, text in enumerate(texts):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation


def test_chatml_prompt_is_llavas_and_ends_open():
    assert talk("qwen_2_5", "<image>\nWhat?", "A cat.", "Sure?", None).get_prompt() == QWEN_2_5_PROMPT


@pytest.mark.parametrize("name", ["qwen_1_5", "qwen_2"])
def test_qwen_1_5_and_2_have_the_short_system_prompt(name):
    prompt = talk(name, "Hi", None).get_prompt()
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plain_puts_nothing_between_image_and_caption():
    assert talk("plain", "<image>", "A cat.").get_prompt() == "<image>A cat.\n"
    assert talk("plain", "<image>", None).get_prompt() == "<image>"


def test_a_prompt_is_how_its_training_text_begins():
    """Trained as served: the open prompt is the training text up to the answer, for every template."""
    for name in conv_templates:
        asked, answered = talk(name, "<image>", None), talk(name, "<image>", "A cat.")
        answer_and_rest = "".join(
            span.text for span in answered.turns()[-1] if span.part not in (Part.CONTEXT, Part.HEADER)
        )
        assert asked.get_prompt() + answer_and_rest == answered.get_prompt()
        assert answered.get_prompt().rstrip("\n").endswith(answered.stop_str.rstrip("\n"))


def test_spans_name_every_piece_of_an_answer():
    last = talk("qwen_2_5", "What?", "A cat.").turns()[-1]
    assert [(span.text, span.part) for span in last] == [
        ("<|im_start|>assistant\n", Part.HEADER),
        ("A cat.", Part.ANSWER),
        ("<|im_end|>", Part.END),
        ("\n", Part.TAIL),
    ]


def test_an_empty_system_prompt_leaves_no_markup():
    conversation = talk("qwen_2_5", "Hi", None)
    conversation.system = ""
    assert conversation.get_prompt().startswith("<|im_start|>user\n")


def test_a_copy_is_independent_and_complete():
    original = talk("qwen_2_5", "Hi", None)
    copy = original.copy()
    copy.messages[-1][1] = "Hello."
    copy.append_message(copy.roles[0], "And?")
    copy.set_system_message("Answer briefly.")
    assert original == talk("qwen_2_5", "Hi", None)
    assert "Answer briefly.<|im_end|>" in copy.get_prompt()
    assert conv_templates["qwen_2_5"].messages == []
