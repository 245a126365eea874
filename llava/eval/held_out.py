"""Greedy answers of a checkpoint to a held-out file, scored:

    python -m llava.eval.held_out --model-path RUN --questions heldout_qa.json --image-folder DIR --output X.jsonl
    python -m llava.eval.held_out --model-path RUN --captions heldout_captions.json --image-folder DIR --output X.jsonl

X.jsonl gets a row per record, X.summary.json the scores. Questions count by exact match (case, outer white space and a
trailing period aside), captions by the share of the record's `facts` that stand in them verbatim.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.data.mixture import load_records
from llava.eval.answering import Answer, Answerer
from llava.eval.items import Item, make_item
from llava.eval.models import LoadedModel, load_checkpoint, load_untrained, randomise
from llava.eval.results import summary_path, write_json, write_rows
from llava.eval.scoring import Row, fact_hits, is_exact_match, summarise
from llava.eval.text_table import format_table, percent
from llava.inference import get_template
from llava.utils import mistakes_in_one_line, positive_int

# A template with roles for models that Stage I, whose `plain` has no place for a question, or nothing trained.
QUESTION_TEMPLATE, CAPTION_TEMPLATE = "qwen_2_5", "plain"
MAX_NEW_TOKENS = {"questions": 24, "captions": 192}


def main(argv: list[str] | None = None) -> None:
    """The command. A mistake in flags or files is one line on stderr and a non-zero exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    args = make_parser().parse_args(argv)
    with mistakes_in_one_line():
        summary = run(args)
    sys.stdout.write(describe(summary) + "\n")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Answer, score, write; returns the summary."""
    started = time.monotonic()
    task = "questions" if args.questions else "captions"
    records = load_records(args.questions or args.captions)[: args.limit]
    loaded = load_model(args)
    if args.random_tower:
        randomise(loaded.model.get_vision_tower(), args.seed)
    template_name, template = choose_template(args.conv_mode, loaded.model.config, task)
    items = [
        make_item(record, template, loaded.tokenizer, args.image_folder, with_facts=task == "captions")
        for record in records
    ]
    answerer = Answerer(
        loaded.model,
        loaded.tokenizer,
        loaded.image_processor,
        template,
        max_new_tokens=args.max_new_tokens or MAX_NEW_TOKENS[task],
        batch_size=args.batch_size,
        blank=args.blank,
        force_resize=args.force_resize,
    )
    answers = answerer(items, description=f"{task}, {Path(args.model_path).name}")
    rows = [make_row(item, answer) for item, answer in zip(items, answers, strict=True)]
    summary = {
        "task": task,
        **summarise(rows, args.fixed_size),
        "template": template_name,
        "seconds": round(time.monotonic() - started, 1),
        "arguments": {name: value for name, value in vars(args).items() if value not in (None, False)},
    }
    write_rows(Path(args.output), rows)
    write_json(summary_path(Path(args.output)), summary)
    return summary


def load_model(args: argparse.Namespace) -> LoadedModel:
    """The checkpoint, or with --untrained what Stage I would start from."""
    if not args.untrained:
        if args.vision_tower or args.min_num_vistoken or args.max_num_vistoken:
            raise ValueError(
                "--vision-tower, --min-num-vistoken and --max-num-vistoken go with --untrained; "
                "a checkpoint brings its own."
            )
        return load_checkpoint(args.model_path, device=args.device)
    if not args.vision_tower:
        raise ValueError("--untrained needs --vision-tower, for instance comp-siglip:path/to/siglip.")
    bounds = {"min_num_vistoken": args.min_num_vistoken, "max_num_vistoken": args.max_num_vistoken}
    return load_untrained(
        args.model_path,
        args.vision_tower,
        mm_projector_type=args.mm_projector_type,
        seed=args.seed,
        device=args.device,
        processor_options={name: value for name, value in bounds.items() if value is not None},
    )


def choose_template(name: str | None, config: Any, task: str) -> tuple[str, Conversation]:
    """`--conv-mode`, else the checkpoint's; a question is put in a template that has a place for it."""
    fallback = QUESTION_TEMPLATE if task == "questions" else CAPTION_TEMPLATE
    chosen = name or getattr(config, "mm_conversation_template", None) or fallback
    template = get_template(chosen)
    if name is None and task == "questions" and template.sep_style is SeparatorStyle.PLAIN:
        return QUESTION_TEMPLATE, get_template(QUESTION_TEMPLATE)
    return chosen, template


def make_row(item: Item, answer: Answer) -> Row:
    """An item, what was answered and how it scores: `correct`, or for a caption `facts` and `hits`."""
    row = {"id": item.id, "kind": item.kind, "image": item.image, "width": answer.width, "height": answer.height}
    row |= {"question": item.question, "answer": item.answer, "prediction": answer.text}
    if item.facts is None:
        return row | {"correct": is_exact_match(answer.text, item.answer)}
    return row | {"facts": item.facts, "hits": fact_hits(item.facts, answer.text)}


def describe(summary: dict[str, Any]) -> str:
    """The scores as a table; for captions with the large images' row."""
    kinds = [(kind, scores) for kind, scores in summary["kinds"].items()]
    if summary["task"] == "captions":
        kinds.append((f"large (fixed {summary['large']['fixed_size']})", summary["large"]))
        header = ("kind", "images", "facts", "facts right")
    else:
        header = ("kind", "n", "exact match")
    rows = []
    for kind, scores in [*kinds, ("all", summary)]:
        counts = [scores["n"], scores["scored"]][: len(header) - 2]
        rows.append((kind, *map(str, counts), percent(scores["accuracy"])))
    return format_table(header, rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.held_out", description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="checkpoint; with --untrained the bare LLM")
    file = parser.add_mutually_exclusive_group(required=True)
    file.add_argument("--questions", help="LLaVA JSON, a record per question, with `kind`")
    file.add_argument("--captions", help="LLaVA JSON, a record per caption, with `kind` and `facts`")
    parser.add_argument("--image-folder", required=True)
    parser.add_argument("--output", required=True, help="X.jsonl; X.summary.json is written beside it")
    parser.add_argument("--blank", action="store_true", help="show a grey image of the same size instead of each image")
    parser.add_argument("--random-tower", action="store_true", help="randomise the tower's weights after loading")
    parser.add_argument("--force-resize", type=positive_int, help="squash images to this square; default: as trained")
    parser.add_argument("--conv-mode", choices=sorted(conv_templates), help="default: the checkpoint's template")
    parser.add_argument("--batch-size", type=positive_int, default=32)
    parser.add_argument("--max-new-tokens", type=positive_int, help="default: 24 for questions, 192 for captions")
    parser.add_argument("--limit", type=positive_int, help="only the first so many records")
    parser.add_argument("--fixed-size", type=positive_int, default=192, help="'large' is measured against this square")
    parser.add_argument("--seed", type=int, default=0, help="of --random-tower and --untrained")
    parser.add_argument("--device", help="default: the accelerator, or the CPU")
    untrained = parser.add_argument_group("the start of Stage I")
    untrained.add_argument("--untrained", action="store_true", help="bare LLM, original tower, random adapter")
    untrained.add_argument("--vision-tower", help="NAME:WEIGHTS")
    untrained.add_argument("--mm-projector-type", default="downsample_mlp")
    untrained.add_argument("--min-num-vistoken", type=positive_int)
    untrained.add_argument("--max-num-vistoken", type=positive_int)
    return parser


if __name__ == "__main__":
    main()
