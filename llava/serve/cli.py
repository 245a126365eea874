"""Talk with a model about images, in the terminal:

    python -m llava.serve.cli --model-path RUN --image-file IMG [IMG ...]                    a conversation
    python -m llava.serve.cli --model-path RUN --image-file IMG --prompt "What is this?"     one answer on stdout
    python -m llava.serve.cli --model-path RUN --image-folder DIR --prompt "..." --out FILE.jsonl     one for each image

An empty line or Ctrl-D ends a conversation, Ctrl-C an answer.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

from llava.conversation import Conversation, conv_templates
from llava.inference import decode_answer, generation_options, prompt_ids, question
from llava.mm_utils import for_sample, load_image
from llava.serve.folder import FolderJob
from llava.serve.requests import Sampling
from llava.serve.served_model import ServedModel, load_served_model
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
        if args.image_folder is not None:
            answer_folder(args)
            return
        chat = start_chat(args)
        if args.prompt is not None:
            sys.stdout.write(chat.ask(args.prompt) + "\n")
        else:
            converse(chat)


def start_chat(args: argparse.Namespace) -> Chat:
    """Images first: a wrong path should not cost the time to load a model."""
    images: list[Image.Image] = [load_image(path) for path in args.image_file]
    served = load(args)
    processor = for_sample(served.processor(args.max_num_vistoken), len(images))
    inputs = {name: tensor.to(served.model.device) for name, tensor in processor(images).items()}
    conversation = served.template.copy()
    return Chat(served.model, served.tokenizer, inputs, conversation, args.max_new_tokens, args.temperature)


def load(args: argparse.Namespace) -> ServedModel:
    """The model that the flags name."""
    return load_served_model(
        args.model_path,
        args.model_base,
        device=args.device,
        attn_implementation=args.attn_implementation,
        template=args.conv_mode,
    )


def answer_folder(args: argparse.Namespace) -> None:
    """One answer about each image of a folder."""
    if args.prompt is None or args.out is None:
        raise ValueError(
            "--image-folder needs --prompt, the question about each image, and --out, a file for the answers."
        )
    job = FolderJob(args.image_folder, args.out, args.prompt, args.model_path)
    if not job.left:
        sys.stderr.write(f"{args.out}: nothing left to answer\n")
        return
    sampling = Sampling(args.max_new_tokens, args.temperature)
    job.run(load(args), sampling, batch_size=args.batch_size, budget=args.max_num_vistoken)


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
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--image-file", nargs="+", metavar="IMG", help="all of them belong to the first question")
    images.add_argument("--image-folder", type=Path, metavar="DIR", help="ask --prompt about every image below it")
    parser.add_argument("--prompt", help="ask this, write the answer alone to stdout, and end")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines of a folder's answers; gone on with")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="of a folder's images; default 8")
    parser.add_argument("--max-num-vistoken", type=positive_int, help="most visual tokens; default: the checkpoint's")
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
