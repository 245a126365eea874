"""The text that the LLM learns from: captions, and questions answered from a caption. No picture is ever drawn."""

import random
from collections.abc import Iterator

from playground.content import Question
from playground.generate import COMPOSERS, choose_size
from playground.records import CAPTION_PROMPT
from playground.splits import TRAIN

SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_PLAIN_SHARE = 0.1
_COPY_SHARE = 0.25
_MAX_TURNS = 4

# A piece of text and whether the LLM is trained on it.
Span = tuple[str, bool]


def plain_text(caption: str) -> list[Span]:
    """The `plain` template: the caption and a line's end."""
    return [(caption + "\n", True)]


def chat_text(context: str, questions: list[Question]) -> list[Span]:
    """The `qwen_2_5` template, a caption where the image will stand; trained on answers and their end tokens."""
    spans = [(f"{TURN_START}system\n{SYSTEM_PROMPT}{TURN_END}\n", False)]
    for number, question in enumerate(questions):
        lead = f"{context}\n" if number == 0 else ""
        spans.append((f"{TURN_START}user\n{lead}{question.text}{TURN_END}\n{TURN_START}assistant\n", False))
        spans += [(question.answer + TURN_END, True), ("\n", False)]
    return spans


def training_texts(seed: str) -> Iterator[list[Span]]:
    """An endless stream of texts of the training split, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        compose = COMPOSERS[rng.choice(tuple(COMPOSERS))]
        content = compose(rng, TRAIN, choose_size(rng, TRAIN))
        caption, draw = content.caption(), rng.random()
        if draw < _PLAIN_SHARE:
            yield plain_text(caption)
        elif draw < _PLAIN_SHARE + _COPY_SHARE:
            yield chat_text(caption, [Question("caption", CAPTION_PROMPT, caption)])
        else:
            yield chat_text(caption, content.questions(rng)[:_MAX_TURNS])
