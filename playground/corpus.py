"""The text that the LLM learns from: captions, and questions answered from a caption. No picture is ever drawn."""

import random
from collections.abc import Iterator

from playground.content import Question
from playground.generate import COMPOSERS, choose_size
from playground.records import CAPTION_PROMPT
from playground.splits import TRAIN

SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Shares of the four kinds of text; what is left over is chat.
_CAPTION_SHARE, _RELIST_SHARE, _QUIZ_SHARE, _COPY_SHARE = 0.08, 0.25, 0.27, 0.05
_MAX_TURNS = 5
MOST_FACTS = 9
_MOST = {"document": 7, "chart": 6, "scene": MOST_FACTS}

# A piece of text and whether the LLM is trained on it.
Span = tuple[str, bool]


def plain_text(caption: str) -> list[Span]:
    """The `plain` template: the caption and a line's end."""
    return [(caption + "\n", True)]


def relisted_text(caption: str, facts: list[str]) -> list[Span]:
    """The caption and its facts again in another order: nearly every token is one to look up."""
    return [(caption + "\n", False), ("; ".join(facts) + "\n", True)]


def quiz_text(caption: str, questions: list[Question]) -> list[Span]:
    """The caption and questions with their answers, a line each, without a template."""
    spans = [(caption + "\n", False)]
    for question in questions:
        spans += [(question.text + "\n", False), (question.answer + "\n", True)]
    return spans


def chat_text(context: str, questions: list[Question]) -> list[Span]:
    """The `qwen_2_5` template, a caption where the image will stand; trained on answers and their end tokens."""
    spans = [(f"{TURN_START}system\n{SYSTEM_PROMPT}{TURN_END}\n", False)]
    for number, question in enumerate(questions):
        lead = f"{context}\n" if number == 0 else ""
        spans.append((f"{TURN_START}user\n{lead}{question.text}{TURN_END}\n{TURN_START}assistant\n", False))
        spans += [(question.answer + TURN_END, True), ("\n", False)]
    return spans


def training_texts(seed: str, most_facts: int = MOST_FACTS) -> Iterator[list[Span]]:
    """An endless stream of texts of the training split, the same for the same seed.

    Args:
        most_facts: at most so many fields, bars or shapes in a caption (the curriculum starts with few).
    """
    rng = random.Random(seed)
    while True:
        kind = rng.choice(tuple(COMPOSERS))
        content = COMPOSERS[kind](rng, TRAIN, choose_size(rng, TRAIN), min(most_facts, _MOST[kind]))
        caption, facts, questions = content.caption(), content.facts(), content.questions(rng)
        rng.shuffle(facts)
        copy = [Question("caption", CAPTION_PROMPT, caption)]
        texts = (
            plain_text(caption),
            relisted_text(caption, facts),
            quiz_text(caption, questions),
            chat_text(caption, copy),
            chat_text(caption, questions[:_MAX_TURNS]),
        )
        shares = (_CAPTION_SHARE, _RELIST_SHARE, _QUIZ_SHARE, _COPY_SHARE)
        yield rng.choices(texts, (*shares, 1 - sum(shares)))[0]
