"""Held-out records as prompts: a LLaVA record with one exchange, in the template that the model was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation
from llava.data.records import build_conversation, image_names, image_paths, read_turn
from llava.inference import prompt_ids


@dataclass(frozen=True)
class Item:
    """One thing to answer.

    Attributes:
        image: The path as the record has it; `path` is where it lies.
        question: Without `<image>`.
        facts: Of a caption record; None for a question.
        input_ids: (T,), one IMAGE_TOKEN_INDEX for the image.
    """

    id: str
    kind: str
    image: str
    path: str
    question: str
    answer: str
    facts: list[str] | None
    input_ids: Tensor


def make_item(
    record: dict[str, Any], template: Conversation, tokenizer: Any, image_folder: str, *, with_facts: bool
) -> Item:
    """Read one held-out record.

    Raises:
        ValueError: It has not one image and one exchange, or no `facts` where they are asked for.
    """
    conversation = build_conversation(record, template)
    images = image_names(record)
    if len(images) != 1 or len(conversation.messages) != 2:
        raise ValueError(
            f"record {record['id']}: a held-out record has one image and one exchange; "
            f"found {len(images)} image(s) and {len(conversation.messages)} turn(s)."
        )
    facts = record.get("facts") if with_facts else None
    if with_facts and not (isinstance(facts, list) and facts and all(isinstance(fact, str) for fact in facts)):
        raise ValueError(f"record {record['id']}: --captions needs `facts`, a list of texts; found {facts!r:.80}.")
    answer = conversation.messages[1][1]
    conversation.messages[1][1] = None
    # Read from the record, not from the conversation: `plain` drops a question's words.
    turns = [read_turn(turn, index) for index, turn in enumerate(record["conversations"])]
    question = next(text for role, text in turns if role == "user")
    return Item(
        id=record["id"],
        kind=str(record.get("kind", "all")),
        image=images[0],
        path=image_paths(record, image_folder)[0],
        question=question.replace(DEFAULT_IMAGE_TOKEN, "").strip(),
        answer=answer,
        facts=facts,
        input_ids=prompt_ids(conversation, tokenizer),
    )
