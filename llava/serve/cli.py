"""Talk with a model about images, in the terminal:

    python -m llava.serve.cli --model-path RUN --image-file IMG [IMG ...]                    a conversation
    python -m llava.serve.cli --model-path RUN --image-file IMG --prompt "What is this?"     one answer on stdout

An empty line or Ctrl-D ends a conversation, Ctrl-C an answer.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

from llava.conversation import Conversation, conv_templates
from llava.inference import check_model_path, decode_answer, generation_options, get_template, prompt_ids, question
from llava.mm_utils import load_image
from llava.model.builder import load_pretrained_model
from llava.utils import mistakes_in_one_line, positive_int


@dataclass
class Chat:
    """A conversation about some images, and the model that takes part in it."""

    model: Any
    tokenizer: Any
    inputs: dict[str, torch.Tensor]  # pixel_values (P, 3·p·p), image_grid_thw (N, 3)
    conversation: Conversation
    max_new_tokens: int
    temperature: float

    @torch.inference_mode()
    def ask(self, text: str, *, stream: bool = False) -> str:
        """Say `text`, return the answer, remember both. The images belong to the first question, before its text.

        Args:
            stream: Write the answer to stdout word by word while it is made.
        """
        images = 0 if self.conversation.messages else len(self.inputs["image_grid_thw"])
        self.conversation.append_message(self.conversation.roles[0], question(self.conversation, text, images))
        self.conversation.append_message(self.conversation.roles[1], None)
        options = generation_options(
            self.conversation, self.tokenizer, max_new_tokens=self.max_new_tokens, temperature=self.temperature
        )
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        new_tokens = self.model.generate(
            [prompt_ids(self.conversation, self.tokenizer).to(self.model.device)],
            **self.inputs,
            **options,
            streamer=streamer,
        )
        answer = decode_answer(new_tokens[0], self.tokenizer, options["eos_token_id"])
        self.conversation.messages[-1][1] = answer
        return answer

    def forget_last(self) -> None:
        """Take back a question whose answer was interrupted."""
        del self.conversation.messages[-2:]


def main(argv: list[str] | None = None) -> None:
    """The command. A mistake in flags or files is one line on stderr and a non-zero exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    args = make_parser().parse_args(argv)
    with mistakes_in_one_line():
        chat = start_chat(args)
        if args.prompt is not None:
            sys.stdout.write(chat.ask(args.prompt) + "\n")
        else:
            converse(chat)


def start_chat(args: argparse.Namespace) -> Chat:
    """Images first: a wrong path should not cost the time to load a model."""
    images: list[Image.Image] = [load_image(path) for path in args.image_file]
    check_model_path(args.model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path, args.model_base, device=args.device, attn_implementation=args.attn_implementation
    )
    if image_processor is None:
        raise ValueError(f"--model-path {args.model_path} has no vision tower, so it cannot look at images.")
    template = args.conv_mode or getattr(model.config, "mm_conversation_template", None)
    if template is None:
        raise ValueError(
            f"{args.model_path} does not say which chat template it was trained with (mm_conversation_template). "
            f"Give --conv-mode, one of {', '.join(sorted(conv_templates))}."
        )
    inputs = {name: tensor.to(model.device) for name, tensor in image_processor(images).items()}
    return Chat(model, tokenizer, inputs, get_template(template), args.max_new_tokens, args.temperature)


def converse(chat: Chat) -> None:
    """Question and answer until an empty line or the end of the input."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = input("USER: " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            return
        try:
            if interactive:
                sys.stdout.write("ASSISTANT: ")
                sys.stdout.flush()
            chat.ask(text, stream=True)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            chat.forget_last()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.serve.cli", description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="checkpoint folder")
    parser.add_argument("--model-base", help="LLM of a Stage-I folder; default: the one that its config names")
    parser.add_argument("--image-file", required=True, nargs="+", metavar="IMG")
    parser.add_argument("--prompt", help="ask this, write the answer alone to stdout, and end")
    parser.add_argument("--conv-mode", choices=sorted(conv_templates), help="default: the checkpoint's template")
    parser.add_argument("--temperature", type=_not_negative, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--max-new-tokens", type=positive_int, default=512)
    parser.add_argument("--device", help="default: the accelerator, or the CPU")
    parser.add_argument("--attn_implementation", "--attn-implementation", default="auto")
    return parser


def _not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


if __name__ == "__main__":
    main()
