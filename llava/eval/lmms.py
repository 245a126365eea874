"""This project's models in lmms-eval, as its plug-in `llava_comp` (entry point `lmms_eval.models`):

    python -m lmms_eval --model llava_comp --model_args pretrained=RUN,max_num_vistoken=4000 --tasks chartqa ...

scripts/comp/eval.sh is the short way; scripts/install_lmms_eval.sh installs lmms-eval, which alone imports this file.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.answering import generate_answers
from llava.eval.held_out import choose_template
from llava.eval.models import load_checkpoint
from llava.inference import prompt_ids
from llava.mm_utils import for_sample
from llava.model.builder import default_device
from llava.model.multimodal_encoder.builder import checkpoint_image_processor

logger = logging.getLogger(__name__)

MODEL = "llava_comp"
MAX_NEW_TOKENS = 1024  # where a task does not say
BATCHES_OPEN = 4  # whose images are held at once, so that those of like size can be put together


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest(MODEL, simple_class_path=f"{__name__}.LlavaComp")


@dataclass(frozen=True)
class Request:
    """One thing to answer.

    Attributes:
        order: its place among all requests.
        task: of lmms-eval.
        options: of generation, as the task gives them.
    """

    order: int
    task: str
    text: str
    images: list[Image.Image]
    options: dict[str, Any]


class LlavaComp(lmms):
    """A checkpoint of this project, or a plain LLaVA one.

    Model arguments:
        pretrained: the checkpoint.
        max_num_vistoken, min_num_vistoken: visual tokens of an image; unset, the checkpoint's own. The authors
            evaluate with 800 to 4000.
        force_resize: px of a square, or `none` for native; unset, the checkpoint's own.
        conv_template: unset, the checkpoint's own.
        strip_period: take a final period off every answer, as the authors do.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_num_vistoken: int | None = None,
        min_num_vistoken: int | None = None,
        force_resize: int | str | None = None,
        conv_template: str | None = None,
        strip_period: bool = False,
        attn_implementation: str = "auto",
    ):
        super().__init__()
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1
        loaded = load_checkpoint(
            str(pretrained),
            device=str(self.accelerator.device) if several else device or default_device(),
            attn_implementation=attn_implementation,
        )
        self.llava, self.tokenizer = loaded.model, loaded.tokenizer
        options = {"max_num_vistoken": max_num_vistoken, "min_num_vistoken": min_num_vistoken}
        options |= {"force_resize": force_resize}
        self.image_processor = with_processor_options(loaded, options)
        _, self.template = choose_template(conv_template, self.llava.config, "questions")
        self.batch_size, self.strip_period = int(batch_size), strip_period
        self.asked: Counter[str] = Counter()  # requests of each task in this process
        self.failed: Counter[str] = Counter()  # those of them without an answer
        self.first_errors: dict[str, str] = {}

    @property
    def device(self) -> torch.device:
        return self.llava.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to every request, "" where its image or its generation failed."""
        answers = [""] * len(requests)
        batches = track(
            self._batches(requests),
            "answering",
            total=-(-len(requests) // self.batch_size),
            console=Console(stderr=True),
            disable=self.rank != 0,
        )
        for batch in batches:
            for request, answer in zip(batch, self._answer(batch), strict=True):
                answers[request.order] = answer
                self.cache_hook.add_partial("generate_until", (request.text, request.options), answer)
        return answers

    def clean(self) -> None:
        """After the last answer, in every process."""
        self.refuse_failed_tasks()
        super().clean()

    def refuse_failed_tasks(self) -> None:
        """Raise, in all processes at once, if a task has no answer in any of them."""
        asked, failed, errors = Counter(), Counter(), {}
        for others in gather_object([(self.asked, self.failed, self.first_errors)]):
            asked.update(others[0])
            failed.update(others[1])
            errors |= others[2]
        for task, number in asked.items():
            if number == failed[task]:
                raise ValueError(f"every one of {number} requests of {task} failed: {errors[task]}")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(f"{MODEL} answers by generation; a task of this kind needs generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(f"{MODEL} answers single turns; a task of several rounds cannot be run.")

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[Request]]:
        """Batches whose images are opened when their turn comes: those of a whole task would not fit into memory."""
        held = BATCHES_OPEN * self.batch_size
        for start in range(0, len(requests), held):
            readable = []
            for order, instance in enumerate(requests[start : start + held], start):
                self.asked[instance.args[4]] += 1
                try:
                    readable.append(self._read(order, instance))
                except Exception as error:  # Pillow's decoders and the tasks' own functions raise many kinds
                    self._note_failure(instance.args[4], instance.args[0], error)
            yield from batches_of(readable, self.batch_size)

    def _read(self, order: int, instance: Instance) -> Request:
        """Open the images of a request."""
        text, options, doc_to_visual, doc_id, task, split = instance.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        images = list(flatten(visuals if visuals is not None else []))
        wrong = next((each for each in images if not isinstance(each, Image.Image)), None)
        if wrong is not None:
            raise ValueError(f"a visual of {task} is a {type(wrong).__name__}; {MODEL} reads images only.")
        return Request(order, task, with_placeholders(text, len(images)), images, dict(options))

    def _answer(self, batch: Sequence[Request]) -> list[str]:
        """Of a batch; where it fails, one request after the other, so that the good ones have their answers.

        That begins after the `except`: within it the failed batch's tensors still live in the error's traceback.
        """
        try:
            return self._generate(batch)
        except Exception as error:
            if len(batch) == 1:
                self._note_failure(batch[0].task, batch[0].text, error)
                return [""]
            logger.warning("a batch of %d failed (%s); one by one", len(batch), str(error))
        return [answer for request in batch for answer in self._answer([request])]

    def _generate(self, batch: Sequence[Request]) -> list[str]:
        prompts = []
        for request in batch:
            conversation = self.template.copy()
            conversation.append_message(conversation.roles[0], request.text)
            conversation.append_message(conversation.roles[1], None)
            prompts.append(prompt_ids(conversation, self.tokenizer))
        answers = generate_answers(
            self.llava,
            self.tokenizer,
            self._inputs(batch),
            prompts,
            self.template,
            max_new_tokens=batch[0].options.get("max_new_tokens", MAX_NEW_TOKENS),
        )
        return [self._finish(answer, request.options) for answer, request in zip(answers, batch, strict=True)]

    def _inputs(self, batch: Sequence[Request]) -> dict[str, Tensor]:
        """The images of a batch, end to end, each request's processed as training processes a sample of so many."""
        parts = [for_sample(self.image_processor, len(each.images))(each.images) for each in batch if each.images]
        if not parts:
            return self.image_processor([])
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _finish(self, answer: str, options: dict[str, Any]) -> str:
        """Cut at the task's own stops; the model's are cut already."""
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            answer = answer.split(stop)[0] if stop else answer
        answer = answer.strip()
        return answer.removesuffix(".") if self.strip_period else answer

    def _note_failure(self, task: str, text: str, error: Exception) -> None:
        said = f"{type(error).__name__}: {error}"  # the error itself would keep its tensors alive
        self.failed[task] += 1
        self.first_errors.setdefault(task, said)
        logger.warning("answered with nothing: %s: %.120s: %s", task, text, said)


def with_processor_options(loaded: Any, options: dict[str, Any]) -> Any:
    """The checkpoint's image processor under other options; None leaves one as it is, `none` takes it away."""
    chosen = {name: None if value == "none" else value for name, value in options.items() if value is not None}
    if not chosen:
        return loaded.image_processor
    least = getattr(loaded.image_processor, "min_num_vistoken", None)
    if chosen.get("max_num_vistoken") and least is not None and "min_num_vistoken" not in chosen:
        chosen["min_num_vistoken"] = min(least, chosen["max_num_vistoken"])  # a small budget wins over the checkpoint's
    return checkpoint_image_processor(loaded.model.config, **chosen)


def with_placeholders(text: str, images: int) -> str:
    """One `<image>` for each image: where the task put them, if it did, else before the text as LLaVA has it."""
    if text.count(DEFAULT_IMAGE_TOKEN) == images:
        return text
    return f"{DEFAULT_IMAGE_TOKEN}\n" * images + text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def batches_of(requests: Sequence[Request], batch_size: int) -> list[list[Request]]:
    """Requests of one kind of generation and about equally many pixels together, the largest first."""

    def kind(request: Request) -> tuple[str, int]:
        return repr(sorted(request.options.items(), key=str)), -sum(i.width * i.height for i in request.images)

    ordered = sorted(requests, key=kind)
    batches: list[list[Request]] = []
    for request in ordered:
        if batches and len(batches[-1]) < batch_size and batches[-1][0].options == request.options:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


def flatten(values: Any):
    """Images out of lists of lists."""
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, list | tuple):
            yield from flatten(value)
        else:
            yield value
