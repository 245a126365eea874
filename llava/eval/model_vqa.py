"""Answers to a file of questions, one JSON line each, as LLaVA's scorers read them.

    python -m llava.eval.model_vqa --model-path RUN --question-file Q.jsonl --image-folder IMAGES --answers-file A.jsonl

A question is LLaVA's `{"question_id", "image", "text"}` or LLaVA-NeXT's `{"sample_id", "image": [...], "conversations",
"metadata"}`, whose later turns follow on the model's own answers. Run again, it goes on where it ended. A question that
cannot be answered (an image is missing or broken) gets an empty answer and an `error`, and the run goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shortuuid
import torch
from rich.console import Console
from rich.progress import track

from llava.data.records import is_below
from llava.inference import decode_answer, generation_options, get_template, prompt_ids, question
from llava.mm_utils import for_sample, get_model_name_from_path, load_image
from llava.model.builder import load_pretrained_model
from llava.utils import mistakes_in_one_line, positive_int

logger = logging.getLogger(__name__)


def read_records(path: str) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, or of a .json list."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        if path.endswith(".jsonl"):
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: expected a list of objects, or one object on each line of a .jsonl.")
    return records


@dataclass(frozen=True)
class Asked:
    """One record of the question file: its questions in turn, and what each answer's line repeats of it."""

    images: list[str]
    texts: list[str]
    lines: list[dict[str, Any]]

    def keys(self) -> list[str]:
        """What tells its answers' lines from all others."""
        return [_key(line) for line in self.lines]


def read_question(record: dict[str, Any], place: str) -> Asked:
    """A record of either kind.

    Raises:
        ValueError: It is of neither.
    """
    images = record.get("image") or []
    images = images if isinstance(images, list) else [images]
    if "question_id" in record and isinstance(record.get("text"), str):
        line = {"question_id": record["question_id"], "prompt": record["text"]}
        return Asked(images, [record["text"]], [line])
    turns = record.get("conversations")
    if "sample_id" in record and isinstance(turns, list) and turns:
        told = record.get("metadata") or {}
        texts = [turn["value"] for turn in turns[::2]]
        truths = [turn["value"] for turn in turns[1::2]] + [None] * (len(turns) % 2)
        same = {"dataset": told.get("dataset"), "sample_id": record["sample_id"]}
        kind = told.get("question_type")
        lines = [
            same | {"turn": number, "prompt": text, "gt_response": truth, "question_type": kind}
            for number, (text, truth) in enumerate(zip(texts, truths, strict=True))
        ]
        return Asked(images, texts, lines)
    raise ValueError(f"{place}: expected question_id and text, or sample_id and conversations; found {sorted(record)}.")


@dataclass(frozen=True)
class Answers:
    """A model that answers, with all that a prompt needs."""

    model: Any
    tokenizer: Any
    image_processor: Any
    template: str
    image_folder: str
    extra_prompt: str
    max_new_tokens: int
    temperature: float
    top_p: float | None
    num_beams: int

    @torch.inference_mode()
    def __call__(self, asked: Asked) -> Iterator[str]:
        """The answer to each of the record's questions, in turn."""
        images = [load_image(self._locate(image)) for image in asked.images]
        inputs = for_sample(self.image_processor, len(images))(images) if images else {}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        conversation = get_template(self.template)
        for number, text in enumerate(asked.texts):
            text = question(conversation, self.extra_prompt + text, 0 if number else len(images))
            conversation.append_message(conversation.roles[0], text)
            conversation.append_message(conversation.roles[1], None)
            options = generation_options(
                conversation,
                self.tokenizer,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                num_beams=self.num_beams,
            )
            prompt = prompt_ids(conversation, self.tokenizer).to(self.model.device)
            new_tokens = self.model.generate([prompt], **inputs, **options)
            answer = decode_answer(new_tokens[0], self.tokenizer, options["eos_token_id"])
            conversation.messages[-1][1] = answer
            yield answer

    def _locate(self, path: str) -> str:
        root = os.path.abspath(self.image_folder)
        inside = os.path.normpath(os.path.join(root, path))
        if not is_below(inside, root):
            raise ValueError(f"image path {path!r} lies outside --image-folder {self.image_folder}.")
        return inside


def answer_all(answers: Answers, questions: list[Asked], file: Path, model_id: str) -> int:
    """Append to `file` a line for each question that has none there; returns how many of them got an error."""
    done = finished_keys(file)
    left = [asked for asked in questions if not done.issuperset(asked.keys())]
    if len(left) < len(questions):
        logger.info("%s: %d of %d are answered already.", file, len(questions) - len(left), len(questions))
    errors = 0
    with file.open("a", encoding="utf-8") as lines:
        for asked in track(left, "answering", console=Console(stderr=True)):
            made = answers(asked)
            error = None
            for line, key in zip(asked.lines, asked.keys(), strict=True):
                text = ""
                try:
                    text = text if error else next(made)
                except (ValueError, OSError) as problem:
                    error = str(problem)
                    errors += 1
                    logger.warning("%s: %s", key, error)
                if key not in done:
                    lines.write(json.dumps(line | _answer(line, text, model_id, error), ensure_ascii=False) + "\n")
            lines.flush()
    return errors


def finished_keys(file: Path) -> set[str]:
    """The answers that an earlier run left. A last line that was cut short is taken out of the file."""
    if not file.is_file():
        return set()
    whole = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    size = sum(map(len, whole))
    if size < file.stat().st_size:
        os.truncate(file, size)
    return {_key(json.loads(line)) for line in whole}


def _key(line: dict[str, Any]) -> str:
    name = "question_id" if "question_id" in line else "sample_id"
    return f"{name} {line[name]}" + (f", turn {line['turn']}" if line.get("turn") else "")


def _answer(line: dict[str, Any], text: str, model_id: str, error: str | None) -> dict[str, Any]:
    identity = shortuuid.uuid()
    of_llava = {"text": text, "answer_id": identity, "metadata": {}}
    of_next = {"pred_response": text, "shortuuid": identity}
    found = (of_llava if "question_id" in line else of_next) | {"model_id": model_id}
    return found if error is None else found | {"error": error}


def chunk(questions: list[Asked], count: int, number: int) -> list[Asked]:
    """The `number`-th of `count` runs of about the same length."""
    size = -(-len(questions) // count)
    return questions[number * size : (number + 1) * size]


def main(argv: list[str] | None = None) -> None:
    """The command. A mistake in flags or files is one line on stderr and a failing exit."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    args = make_parser().parse_args(argv)
    with mistakes_in_one_line():
        if args.top_p is not None and args.temperature <= 0:
            raise ValueError(f"--top_p {args.top_p} is of sampling, and --temperature 0 is greedy. Give one above 0.")
        records = read_records(args.question_file)
        questions = [read_question(record, f"{args.question_file}[{i}]") for i, record in enumerate(records)]
        questions = chunk(questions[: args.test_size], args.num_chunks, args.chunk_idx)
        tokenizer, model, image_processor, _ = load_pretrained_model(args.model_path, args.model_base)
        template = args.conv_mode or getattr(model.config, "mm_conversation_template", None)
        if template is None:
            raise ValueError(f"{args.model_path} does not say which chat template it has. Give --conv-mode.")
        file = Path(args.answers_file)
        file.parent.mkdir(parents=True, exist_ok=True)
        answers = Answers(
            model,
            tokenizer,
            image_processor,
            template,
            args.image_folder,
            args.extra_prompt,
            args.max_new_tokens,
            args.temperature,
            args.top_p,
            args.num_beams,
        )
        errors = answer_all(answers, questions, file, get_model_name_from_path(args.model_path))
    if errors:
        logger.warning("%d question(s) could not be answered; their lines have an `error`.", errors)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.model_vqa", description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="checkpoint folder")
    parser.add_argument("--model-base", help="LLM of a Stage-I folder; default: the one that its config names")
    parser.add_argument("--image-folder", default=".")
    parser.add_argument("--question-file", required=True, help=".jsonl, or a .json list")
    parser.add_argument("--answers-file", required=True, help="JSON lines; gone on from where it exists")
    parser.add_argument("--extra-prompt", default="", help="said before every question")
    parser.add_argument("--conv-mode", help="default: the checkpoint's template")
    parser.add_argument("--num-chunks", type=positive_int, default=1)
    parser.add_argument("--chunk-idx", type=int, default=0)
    parser.add_argument("--test_size", type=positive_int, help="only so many of the questions")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top_p", type=float, help="where it samples: of the likeliest tokens of this share alone")
    parser.add_argument("--num_beams", type=positive_int, default=1)
    parser.add_argument("--max-new-tokens", type=positive_int, default=1024)
    return parser


if __name__ == "__main__":
    main()
