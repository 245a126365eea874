"""Parameters, memory and steps of a recipe before anything is started.

    python -m llava.train.plan --gpus 8 scripts/comp/stage2_native.sh [the script's flags]
    python -m llava.train.plan --gpus 8 -- --model_name_or_path ... [the trainer's flags]

A script is asked with DRY_RUN=1 what it would start, so the variables that it reads count. Models are built from their
configs alone, and a step runs without arithmetic. Not counted: the CUDA context, NCCL, kernels' scratch, fragmentation.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llava.model.multimodal_encoder.builder import checkpoint_image_processor
from llava.train.flops import ModelFlops
from llava.train.parts import part_of
from llava.train.planning.batches import largest_batch, num_steps, records_of, typical_batch
from llava.train.planning.live import MicroBatch, step_peak
from llava.train.planning.memory import states_memory, zero_settings
from llava.train.planning.model import Stage, meta_model, planned_config
from llava.train.planning.recipe import parse_stage, stages_of
from llava.train.train import weights_dtype
from llava.utils import mistakes_in_one_line, positive_int


def main(argv: list[str] | None = None) -> None:
    """The command. A mistake is one line and a failing exit."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = make_parser()
    args, flags = parser.parse_known_args(argv[:cut])
    if (args.script is None) == (cut == len(argv)):
        parser.error("give a script, or the trainer's flags after --")
    with mistakes_in_one_line():
        if args.script is None:
            stages, makers = [parse_stage(argv[cut + 1 :], args.gpus or 1)], {}
        else:
            stages, makers = stages_of(Path(args.script), flags, args.gpus)
        plans = [plan(stage, makers) for stage in stages]
    if args.json:
        sys.stdout.write(json.dumps(plans, indent=1) + "\n")
    else:
        for each in plans:
            show(each)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.train.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("script", nargs="?", help="a stage's script, or train_all.sh")
    parser.add_argument("--gpus", type=positive_int, help="of each machine; default: as the script counts them, or 1")
    parser.add_argument("--json", action="store_true", help="bytes and counts instead of tables")
    return parser


def plan(stage: Stage, makers: dict[str, Stage]) -> dict[str, Any]:
    """All that can be said of a stage: parameters, bytes of a GPU, steps, FLOPs."""
    dtype = weights_dtype(bf16=stage.training.bf16, deepspeed=stage.deepspeed, use_cpu=stage.use_cpu)
    config = planned_config(stage, makers)
    model, processor = meta_model(stage, config, dtype), checkpoint_image_processor(config)
    records = records_of(stage)
    batches = {"typical": typical_batch(stage, processor, records), "largest": largest_batch(stage, processor)}
    flops = ModelFlops(model)
    of_typical = flops.of_batch(batches["typical"].described()) + flops.of_supervised(batches["typical"].supervised)
    return {
        "output_dir": stage.output_dir,
        "processes": stage.world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "zero_stage": zero_settings(stage)["stage"],
        "packed": stage.training.pack_to_max_length,
        "gradient_checkpointing": stage.training.activation_checkpointing,
        "parameters": parameters(model),
        "bytes": states_memory(stage, model) | {"activations": activations(stage, model, processor, batches)},
        "tokens": {name: batch.borders[-1] for name, batch in batches.items()},
        "steps": num_steps(stage, records),
        "step_tflops": of_typical * stage.training.gradient_accumulation_steps * stage.world_size / 1e12,
    }


def parameters(model: Any) -> dict[str, dict[str, int]]:
    """`total` and `trainable`, by part."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"total": 0, "trainable": 0})
    for name, parameter in model.named_parameters():
        counts[part_of(name)]["total"] += parameter.numel()
        counts[part_of(name)]["trainable"] += parameter.numel() * parameter.requires_grad
    return dict(counts)


def activations(stage: Stage, model: Any, processor: Any, batches: dict[str, MicroBatch]) -> dict[str, int]:
    """By micro-batch what forward and backward hold at their peak; `typical_otherwise` is with gradient checkpointing
    where the stage has none, and without where it has."""

    def peak(batch: MicroBatch, checkpointing: bool) -> int:
        switch = model.activation_checkpointing_enable if checkpointing else model.activation_checkpointing_disable
        switch()
        return step_peak(model, batch, patch_dim=3 * processor.patch_size**2, align_text=stage.model.use_alignment_loss)

    in_force = stage.training.activation_checkpointing
    peaks = {name: peak(batch, in_force) for name, batch in batches.items()}
    return peaks | {"typical_otherwise": peak(batches["typical"], not in_force)}


def show(stage: dict[str, Any]) -> None:
    """The plan as tables."""
    zero = f", ZeRO-{stage['zero_stage']}" if stage["zero_stage"] else ""
    unknown = "steps unknown before packing" if stage["packed"] else "steps unknown without the data"
    steps = unknown if stage["steps"] is None else f"{stage['steps']:,} steps"
    title = f"{stage['output_dir']}: {stage['processes']} x {stage['dtype']}{zero}, {steps}"
    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for part, count in stage["parameters"].items():
        table.add_row(part, f"{count['total']:,}", f"{count['trainable']:,} train")
    table.add_section()
    of_gpu = stage["bytes"]["gpu"]
    for name, size in of_gpu.items():
        table.add_row(name, _bytes(size), "of each process")
    for name, size in stage["bytes"]["host"].items():
        table.add_row(f"{name}, offloaded", _bytes(size), "of each process, in host memory")
    table.add_section()
    peaks = stage["bytes"]["activations"]
    otherwise = "without" if stage["gradient_checkpointing"] else "with"
    for name, tokens in stage["tokens"].items():
        table.add_row(f"activations, {name}", _bytes(peaks[name]), f"a micro-batch of {tokens:,} tokens")
        if name == "typical":
            table.add_row("", _bytes(peaks["typical_otherwise"]), f"{otherwise} gradient checkpointing")
        table.add_row(f"in all, {name}", _bytes(peaks[name] + sum(of_gpu.values())), "")
    table.add_section()
    table.add_row("a typical step", f"{stage['step_tflops']:,.2f} TFLOPs", "of all processes")
    Console(width=110).print(table)


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


if __name__ == "__main__":
    main()
