"""Rendered text as tokens, where the tokens of a text are not those of its pieces.

Sentencepiece puts a space before every text that it is given, and a space belongs to the token after it. So vicuna's
`ASSISTANT: A cat.</s>` is tokenised as one text, and a token belongs to the span in which its last character lies: the
token "▁A" to the answer.
"""

from __future__ import annotations

from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Part, Span


def tokenize_whole(turns: list[list[Span]], tokenizer: Any) -> list[tuple[list[int], list[Part]]]:
    """Of each turn the ids without BOS, one IMAGE_TOKEN_INDEX per `<image>`, and the part that each belongs to."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot say where in the text a token stands, which this chat template needs. "
            "Load the tokenizer with use_fast=True."
        )
    owners = [(turn, span.part) for turn, spans in enumerate(turns) for span in spans for _ in span.text]
    text = "".join(span.text for spans in turns for span in spans)
    tokenized: list[tuple[list[int], list[Part]]] = [([], []) for _ in turns]

    def put(token: int, place: int) -> None:
        turn, part = owners[place]
        tokenized[turn][0].append(token)
        tokenized[turn][1].append(part)

    start = 0
    for number, piece in enumerate(text.split(DEFAULT_IMAGE_TOKEN)):
        if number:
            put(IMAGE_TOKEN_INDEX, start)
            start += len(DEFAULT_IMAGE_TOKEN)
        found = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True) if piece else None
        for token, (first, end) in zip(found.input_ids, found.offset_mapping, strict=True) if found else ():
            put(token, start + max(first, end - 1))
        start += len(piece)
    return tokenized
