"""Held-out questions during training: the kind `held_out` of `--eval_tasks` (`llava.train.evaluation`)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from llava.data.mixture import load_records
from llava.eval.answering import Answerer
from llava.eval.held_out import MAX_NEW_TOKENS, choose_template
from llava.eval.items import make_item
from llava.eval.scoring import is_exact_match
from llava.mm_utils import load_image


class HeldOutQuestions:
    """`accuracy` by exact match of greedy answers, as `python -m llava.eval.held_out --questions` counts it.

    Every process answers a share. All shares are of one length, so that processes with a piece of the weights each run
    the model equally often; what fills up a share is answered and not counted.

    Args:
        file: A LLaVA JSON, one image and one exchange a record.
        run: What a task is given of the run, `llava.train.evaluation.RunParts`.
    """

    def __init__(self, file: str, run: Any) -> None:
        self.run = run
        _, self.template = choose_template(None, run.config, "questions")
        records = load_records(file)[: run.limit]
        items = [
            make_item(record, self.template, run.tokenizer, run.image_folder, with_facts=False) for record in records
        ]
        for item in {item.path: item for item in reversed(items)}.values():  # of an image's questions the first
            try:
                load_image(item.path)  # whole: a broken one would end the run at its first evaluation
            except (OSError, ValueError) as error:
                raise ValueError(f"--eval_tasks {file}: record {item.id}: {error}") from error
        self.share = items[run.rank :: run.num_ranks]
        self.fill = items[: math.ceil(len(items) / run.num_ranks) - len(self.share)]

    def __call__(self, model: nn.Module) -> dict[str, float]:
        answer = Answerer(
            model,
            self.run.tokenizer,
            self.run.image_processor,
            self.template,
            max_new_tokens=MAX_NEW_TOKENS["questions"],
            batch_size=self.run.batch_size,
            synced=self.run.synced,
            show_progress=False,
        )
        answers = answer([*self.share, *self.fill])[: len(self.share)]
        right = sum(is_exact_match(given.text, item.answer) for given, item in zip(answers, self.share, strict=True))
        right, answered = self.run.over_processes([right, len(self.share)])
        return {"accuracy": right / answered}


def register(registry: Any) -> None:
    """The entry point of pyproject.toml."""
    registry.register("held_out", HeldOutQuestions)
