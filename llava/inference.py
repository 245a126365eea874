"""From a conversation to an answer: what chat and evaluation share. T = tokens of a prompt before expansion."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, Part, SeparatorStyle, conv_templates
from llava.mm_utils import bos_prefix, tokenize_pieces
from llava.spans import tokenize_whole

_SAID_BY_MODEL = (Part.ANSWER, Part.END)
# Whatever a checkpoint's generation_config says (Qwen2.5's: sampling, repetition penalty), greedy means greedy.
_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}


def get_template(name: str) -> Conversation:
    """An empty conversation in the template called `name`: `--conv-mode`, or what a checkpoint's config says."""
    if name not in conv_templates:
        raise ValueError(f"mm_conversation_template={name!r} is unknown. Known: {', '.join(sorted(conv_templates))}.")
    return conv_templates[name].copy()


def question(template: Conversation, text: str, images: int) -> str:
    """A user's turn about so many images, as training has it: each `<image>` on a line of its own before the words.

    `plain` has no words beside an image at all. A text that holds its `<image>` itself stays as it is.
    """
    if images == 0 or DEFAULT_IMAGE_TOKEN in text:
        return text
    placeholders = [DEFAULT_IMAGE_TOKEN] * images
    return "".join(placeholders) if template.sep_style is SeparatorStyle.PLAIN else "\n".join([*placeholders, text])


def prompt_ids(conversation: Conversation, tokenizer: Any) -> Tensor:
    """(T,) ids of the conversation so far, one IMAGE_TOKEN_INDEX per `<image>`.

    Text is tokenised in the pieces in which training tokenises it (`llava.data.encoding`): turn by turn, and an answer
    with its end apart from the header before it.
    """
    ids = bos_prefix(tokenizer)
    if conversation.is_one_text:
        ids += [id for turn, _ in tokenize_whole(conversation.turns(), tokenizer) for id in turn]
        return torch.tensor(ids, dtype=torch.long)
    for turn in conversation.turns():
        for _, spans in groupby(turn, key=lambda span: span.part in _SAID_BY_MODEL):
            ids += tokenize_pieces("".join(span.text for span in spans), tokenizer)
    return torch.tensor(ids, dtype=torch.long)


def stop_token_ids(conversation: Conversation, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the template's separator where it is one token, and the tokenizer's EOS."""
    separator = tokenizer(conversation.stop_str or conversation.sep, add_special_tokens=False).input_ids
    ids = separator if len(separator) == 1 else []
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def generation_options(
    conversation: Conversation,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    num_beams: int = 1,
) -> dict[str, Any]:
    """Arguments of `model.generate`: greedy at temperature 0, else sampling, of the likeliest `top_p` alone."""
    stop = stop_token_ids(conversation, tokenizer)
    padding = stop[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    common = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "eos_token_id": stop, "pad_token_id": padding}
    sampling = {"do_sample": True, "temperature": temperature} | ({} if top_p is None else {"top_p": top_p})
    return common | (sampling if temperature > 0 else _GREEDY)


def decode_answer(ids: Tensor, tokenizer: Any, stop: list[int]) -> str:
    """New tokens (T,) -> the answer's text, up to the first id that ends it."""
    ids = ids.tolist()
    end = next((place for place, token in enumerate(ids) if token in stop), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def check_model_path(path: str) -> None:
    """Name the checkpoints inside where `path` is a folder of several stages and no checkpoint itself."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = sorted(str(file.parent) for file in folder.glob("*/config.json"))
        if inside:
            raise ValueError(f"--model-path {path} is no checkpoint, but holds some: {', '.join(inside)}.")
