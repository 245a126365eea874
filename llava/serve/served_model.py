"""A loaded model and how a request becomes what it reads. T = tokens of a prompt, P = patches, N = images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, conv_templates
from llava.inference import check_model_path, get_template, prompt_ids, question, stop_token_ids
from llava.inspection import vocabulary
from llava.mm_utils import for_sample, get_model_name_from_path, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import checkpoint_image_processor
from llava.serve.requests import Dialogue, Refused, Request, Sampling


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Attributes:
        input_ids: (T,), one IMAGE_TOKEN_INDEX per image.
        inputs: The image processor's tensors: pixel_values (P, 3·p·p), image_grid_thw (N, 3).
        length: Tokens with every image widened to its visual tokens.
        text: The prompt as text, where the client gave it so: LLaVA's protocol repeats it before the answer.
    """

    input_ids: Tensor
    inputs: dict[str, Tensor]
    length: int
    sampling: Sampling
    text: str = ""


class TokenGrid(NamedTuple):
    """The visual tokens of an image: rows and columns where they lie in a grid, and their number."""

    rows: int | None
    columns: int | None
    tokens: int


@dataclass(frozen=True)
class ServedModel:
    """A model under the name by which clients ask for it."""

    name: str
    model: Any
    tokenizer: Any
    image_processor: Any
    template: Conversation
    context_length: int

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer."""
        return stop_token_ids(self.template, self.tokenizer)

    @cached_property
    def words(self) -> tuple[list[int], list[str]]:
        """Ids and texts of the tokens that are words."""
        return vocabulary(self.tokenizer)

    @property
    def token_budget(self) -> int | None:
        """The most visual tokens of an image in training; None for a tower that has no such bound."""
        return getattr(self.image_processor, "max_num_vistoken", None)

    def processor(self, max_num_vistoken: int | None = None) -> Any:
        """The checkpoint's image processor, or one with another budget."""
        if max_num_vistoken is None or max_num_vistoken == self.token_budget:
            return self.image_processor
        if self.token_budget is None:
            raise Refused(f"{self.name} has a fixed number of visual tokens: leave max_num_vistoken out.")
        least = min(self.image_processor.min_num_vistoken, max_num_vistoken)
        bounds = {"max_num_vistoken": max_num_vistoken, "min_num_vistoken": least}
        return checkpoint_image_processor(self.model.config, **bounds)

    def token_grid(self, width: int, height: int, max_num_vistoken: int | None = None) -> TokenGrid:
        """What an image of this size becomes. A tower that cuts tiles has a number of tokens, but no grid."""
        processor = self.processor(max_num_vistoken)
        tokens = processor.num_visual_tokens(width, height)
        if self.token_budget is None:
            return TokenGrid(None, None, tokens)
        rows, columns = (side // processor.merge_size for side in processor.grid(width, height))
        return TokenGrid(rows, columns, tokens)

    def prepare(self, request: Request) -> Prompt:
        """Texts to ids and images to patches. Refuses what does not fit into the model's context."""
        processor = for_sample(self.processor(request.max_num_vistoken), len(request.images))
        inputs = processor(list(request.images))
        sizes = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        visual = sum(self.model.get_model().tokens_per_image(**sizes))
        ids, text = self._ids(request.prompt)
        length = len(ids) - len(request.images) + visual
        room = self.context_length - length
        if room < 1:
            raise Refused(
                f"The prompt has {length} tokens, {visual} of them visual, and {self.name}'s context ends at "
                f"{self.context_length}. Send less text, or fewer or smaller images, or lower max_num_vistoken."
            )
        if length == 0:
            raise Refused("The prompt is empty.")
        assert int((ids == IMAGE_TOKEN_INDEX).sum()) == len(request.images), "check_size has counted them"
        sampling = replace(request.sampling, max_new_tokens=min(request.sampling.max_new_tokens, room))
        return Prompt(ids, inputs, length, sampling, text)

    def _ids(self, prompt: Dialogue | str) -> tuple[Tensor, str]:
        if isinstance(prompt, str):
            return tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt"), prompt
        conversation = self.template.copy()
        if prompt.system is not None:
            conversation.set_system_message(prompt.system)
        for turn in prompt.turns:
            role = conversation.roles[turn.role == "assistant"]
            text = question(conversation, turn.text, turn.images) if turn.role == "user" else turn.text
            conversation.append_message(role, text)
        conversation.append_message(conversation.roles[1], None)
        return prompt_ids(conversation, self.tokenizer), ""


def load_served_model(
    path: str,
    base: str | None = None,
    *,
    name: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str = "auto",
    template: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
) -> ServedModel:
    """Load a checkpoint to be served.

    Args:
        template: Chat template; by default the one that the checkpoint was trained with.
    """
    check_model_path(path)
    tokenizer, model, image_processor, context_length = load_pretrained_model(
        path,
        base,
        load_8bit=load_8bit,
        load_4bit=load_4bit,
        device=device,
        torch_dtype=dtype,
        attn_implementation=attn_implementation,
    )
    if image_processor is None:
        raise ValueError(f"--model-path {path} has no vision tower, so it cannot look at images.")
    template = template or getattr(model.config, "mm_conversation_template", None)
    if template is None:
        raise ValueError(
            f"{path} does not say which chat template it was trained with (mm_conversation_template). "
            f"Give --conv-mode, one of {', '.join(sorted(conv_templates))}."
        )
    name = name or get_model_name_from_path(path)
    return ServedModel(name, model, tokenizer, image_processor, get_template(template), context_length)
