"""What a training with upstream's code needs before its first step, and what its data set adds to a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comp_patches.alignment_module import AlignmentLoss
from comp_patches.upstream.hooks.alignment import Alignment
from comp_patches.upstream.hooks.arguments import alignment_options
from comp_patches.upstream.hooks.tower import has_comp_tower

ANSWERS = "align_input_ids"  # of a sample (A,); of a batch a list of them


def prepare_training(model: Any, model_args: Any, data_args: Any) -> None:
    """Called once model and tokenizer are ready: native or tiles, what trains, the alignment loss."""
    if not has_comp_tower(model):
        if model_args.use_alignment_loss:
            raise ValueError("--use_alignment_loss needs a tower of the method: --vision_tower comp-...")
        return
    tower, tiles = model.get_vision_tower(), data_args.image_aspect_ratio != "square"
    if not tiles and model_args.mm_patch_merge_type != "flat":
        raise ValueError(
            f"--mm_patch_merge_type {model_args.mm_patch_merge_type} lays tiles out; at native resolution there are "
            "none. Leave it out, or give --image_aspect_ratio anyres."
        )
    tower.image_processor.tiles = tiles
    if model_args.unfreeze_mm_vision_tower:
        tower.requires_grad_(True)
    data_args.align_answers = model_args.use_alignment_loss
    if model_args.use_alignment_loss:
        loss = AlignmentLoss(**alignment_options(model_args, model.config))
        tower.alignment = Alignment(loss, model_args.alignment_weight)


def aspect_ratio(data_args: Any, overwrite: str | None) -> str | None:
    """What overrides an image's mode: upstream pads those of a sample that has several; native ones need it not."""
    processor = data_args.image_processor
    return None if getattr(processor, "tiles", True) is False else overwrite


def add_answers(dataset: Any, index: int, sample: dict[str, Any]) -> None:
    """Give a sample the ids of its answers' text, read alone, where the alignment loss is on."""
    if not getattr(dataset.data_args, "align_answers", False):
        return
    turns = dataset.list_data_dict[index]["conversations"]
    texts = [turn.get("value", turn.get("content")) for turn in turns if _role(turn) in ("gpt", "assistant")]
    tokenizer = dataset.tokenizer
    ids = tokenizer(" ".join(texts)).input_ids if any(text.strip() for text in texts) else []
    sample[ANSWERS] = torch.tensor(ids[: tokenizer.model_max_length], dtype=torch.long)


def collate_answers(samples: list[dict[str, Any]], batch: dict[str, Any]) -> None:
    """Samples' answers, if they have any, into the batch."""
    if ANSWERS in samples[0]:
        answers: list[Tensor] = [sample[ANSWERS] for sample in samples]
        batch[ANSWERS] = answers


def _role(turn: dict[str, str]) -> str | None:
    return turn.get("from", turn.get("role"))
