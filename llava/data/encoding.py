"""A conversation as `input_ids` and `labels`. T = tokens of the sample, visual tokens included.

Labels come from the template's own spans (`llava.conversation`), never from searching the rendered text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, Part, Span
from llava.data.bad_samples import BadSampleError
from llava.mm_utils import bos_prefix, expand_placeholders, tokenize_pieces
from llava.spans import tokenize_whole

# answers: the answers' tokens, each with its turn's end token, and nothing else.
# llava: LLaVA-NeXT's own, for parity: `Conversation.learned_by_llava`, and the markers wherever they stand.
LABEL_MASKS = ("answers", "llava")


@dataclass
class EncodedConversation:
    """The part of a conversation that fits.

    Attributes:
        input_ids: (T,) int64, IMAGE_TOKEN_INDEX at every visual token.
        labels: (T,) int64, unshifted, IGNORE_INDEX where nothing is learned; always there at the first token.
        answers: The texts of the answers in it.
        num_images: How many of the images are in it.
    """

    input_ids: Tensor
    labels: Tensor
    answers: list[str]
    num_images: int


@dataclass
class _Turn:
    """One turn's ids, with one IMAGE_TOKEN_INDEX per image."""

    input_ids: list[int]
    labels: list[int]
    answer: str | None

    @property
    def num_images(self) -> int:
        return self.input_ids.count(IMAGE_TOKEN_INDEX)


class ConversationEncoder:
    """Turns conversations of one template into ids and labels.

    Args:
        template: The chat template; its markers have to be tokens of the tokenizer.
        label_mask: What is learned, a key of LABEL_MASKS (`--label_mask`).
        max_length: Longest sample in tokens (`--model_max_length`).
    """

    def __init__(self, tokenizer, template: Conversation, *, label_mask: str, max_length: int) -> None:
        if label_mask not in LABEL_MASKS:
            raise ValueError(f"label_mask={label_mask!r} is unknown. Known: {', '.join(LABEL_MASKS)}.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._bos = bos_prefix(tokenizer)
        of_llava = label_mask == "llava"
        self._supervised = template.learned_by_llava if of_llava else {Part.LEAD, Part.ANSWER, Part.END}
        marker_ids = {_single_id(tokenizer, marker) for marker in template.markers}
        self._always_supervised = marker_ids if of_llava else set()

    def __call__(self, conversation: Conversation, tokens_per_image: Sequence[int]) -> EncodedConversation:
        """Encode as many whole turns as fit.

        Args:
            tokens_per_image: Visual tokens of each image, in the order of the `<image>`s.

        Raises:
            BadSampleError: `<image>`s and images differ in number, or no answer is left to learn from.
        """
        turns = self._encode_turns(conversation)
        num_placeholders = sum(turn.num_images for turn in turns)
        if num_placeholders != len(tokens_per_image):
            raise BadSampleError(
                f"its text has {num_placeholders} {DEFAULT_IMAGE_TOKEN}, but it has {len(tokens_per_image)} image(s)",
                kind="wrong number of <image>",
            )
        turns = self._fitting(turns, tokens_per_image)
        num_images = sum(turn.num_images for turn in turns)
        input_ids, labels = expand_placeholders(
            torch.tensor(self._bos + [id for turn in turns for id in turn.input_ids]),
            torch.tensor([IGNORE_INDEX] * len(self._bos) + [label for turn in turns for label in turn.labels]),
            tokens_per_image[:num_images],
        )
        labels[0] = IGNORE_INDEX  # nothing comes before it; in a packed row, the sample before would
        return EncodedConversation(input_ids, labels, [turn.answer for turn in turns if turn.answer], num_images)

    def encode_text(self, text: str) -> Tensor:
        """A bare text's ids (T,), with BOS where the tokenizer adds one."""
        return torch.tensor(self._bos + self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)

    def _encode_turns(self, conversation: Conversation) -> list[_Turn]:
        turns = conversation.turns()
        if not conversation.is_one_text:
            return [self._encode_turn(spans) for spans in turns]
        return [
            _Turn(ids, [self._label(*pair) for pair in zip(ids, parts, strict=True)], answer(spans))
            for spans, (ids, parts) in zip(turns, tokenize_whole(turns, self.tokenizer), strict=True)
        ]

    def _label(self, token: int, part: Part) -> int:
        return token if part in self._supervised else IGNORE_INDEX

    def _encode_turn(self, spans: list[Span]) -> _Turn:
        """Spans of one fate are tokenised together; a border of the mask is a border of tokens."""
        turn = _Turn([], [], answer(spans))
        for is_supervised, group in groupby(spans, key=lambda span: span.part in self._supervised):
            ids = tokenize_pieces("".join(span.text for span in group), self.tokenizer)
            turn.input_ids += ids
            turn.labels += [id if is_supervised or id in self._always_supervised else IGNORE_INDEX for id in ids]
        return turn

    def _fitting(self, turns: list[_Turn], tokens_per_image: Sequence[int]) -> list[_Turn]:
        """The longest run of turns within max_length that ends with an answer: what follows it teaches nothing."""
        length, image, num_kept, first_answer_ends = len(self._bos), 0, 0, 0
        for number, turn in enumerate(turns, start=1):
            visual_tokens = sum(tokens_per_image[image : image + turn.num_images])
            length += len(turn.input_ids) - turn.num_images + visual_tokens
            image += turn.num_images
            if turn.answer and turn.answer.strip():
                first_answer_ends = first_answer_ends or length
                num_kept = number if length <= self.max_length else num_kept
        if not first_answer_ends:
            raise BadSampleError("it has no answer to learn from", kind="no answer")
        if not num_kept:
            raise BadSampleError(
                f"its first answer ends at token {first_answer_ends}, beyond model_max_length={self.max_length}",
                kind="too long",
            )
        return turns[:num_kept]


def answer(spans: list[Span]) -> str | None:
    """The text of a turn's answer."""
    return next((span.text for span in spans if span.part is Part.ANSWER), None)


def _single_id(tokenizer, marker: str) -> int:
    ids = tokenizer(marker, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(
            f"the chat template's {marker!r} is {len(ids)} tokens in this tokenizer, and should be one. "
            "Does --version fit the language model (qwen_*: ChatML tokens; llava_llama_3: Llama 3's; v1: vicuna)?"
        )
    return ids[0]
