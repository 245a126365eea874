"""One training stage: arguments -> model -> data -> trainer. The flags are in `arguments.py`."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from llava.conversation import conv_templates
from llava.data.bad_samples import BadSampleLedger
from llava.data.collator import PackedCollator
from llava.data.dataset import LLaVADataset
from llava.data.mixture import Records, load_records
from llava.model.auxiliary_losses.builder import build_auxiliary_loss
from llava.model.loading import attach_vision, load_adapter_file, load_config, load_weights
from llava.model.multimodal_encoder.base import ImageProcessor
from llava.model.multimodal_encoder.builder import (
    checkpoint_image_processor,
    complete_vision_config,
    take_llava_keys,
    with_weights,
)
from llava.model.sharding import is_sharded
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from llava.train.checkpoints import check_sharding, last_complete_checkpoint, step_of
from llava.train.evaluation import RunParts, Tasks, build_tasks
from llava.train.llava_trainer import LLaVATrainer
from llava.train.lora import add_lora, refuse_lora_folder
from llava.train.output_folder import flush, locked
from llava.train.parts import AUXILIARY, hold_in_float32, parse_parts, set_tunable_parts, trainable_table
from llava.train.preemption import EXIT_STATUS
from llava.train.run_card import add_start, check_same_data
from llava.train.zero import prepare_zero
from llava.utils import mistakes_in_one_line

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """The command. A mistake in flags or files is one line on stderr and a failing exit."""
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    with mistakes_in_one_line():
        model_args, data_args, training_args = parse_arguments(argv)
        first = training_args.process_index == 0
        with locked(training_args.output_dir) if first else nullcontext():
            trainer, checkpoint = build_stage(model_args, data_args, training_args)
            run_stage(trainer, checkpoint)
    if torch.distributed.is_initialized():  # else some backends abort after the work is done
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if trainer.preemption.stopped:
        sys.exit(EXIT_STATUS)


def build_stage(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> tuple[LLaVATrainer, str | None]:
    """Everything that a stage needs, checked before the first step; and the checkpoint to continue from, if any."""
    if training_args.n_gpu > 1:
        raise ValueError(
            f"One process sees {training_args.n_gpu} GPUs. Launch one per GPU: torchrun --nproc_per_node=N."
        )
    if training_args.fp16 and not training_args.deepspeed:
        raise ValueError(
            "--fp16 True without --deepspeed: a loss scale that is too large would end the run. Take --bf16 True, or "
            "--deepspeed scripts/zero2.json, which skips such steps."
        )
    parts = parse_parts(model_args.mm_tunable_parts)
    lora_parts = training_args.adapted_parts(parts)
    refuse_lora_folder(model_args.model_name_or_path)
    if model_args.version not in conv_templates:
        raise ValueError(f"--version {model_args.version!r} is unknown. Known: {', '.join(sorted(conv_templates))}.")
    records = load_records(data_args.data_path, seed=training_args.seed)
    set_seed(training_args.seed)
    prepare_zero(training_args)

    checkpoint = shared_choice(training_args, None if data_args.allow_changed_data else records)
    if checkpoint:
        deepspeed, world_size = bool(training_args.deepspeed), training_args.world_size
        check_sharding(checkpoint, deepspeed=deepspeed, world_size=world_size)
    model = load_model(model_args, data_args, training_args)
    tokenizer = load_tokenizer(model_args.model_name_or_path, training_args.model_max_length)
    image_processor = checkpoint_image_processor(model.config)
    if lora_parts:
        add_lora(model, lora_parts, training_args, model_args.model_name_or_path)
    set_tunable_parts(model, parts, lora_parts, training_args.lora_bias)
    if not training_args.deepspeed:
        hold_in_float32(model)
    record_in_config(model.config, model_args, training_args, tokenizer)
    if model_args.use_alignment_loss:
        name = model_args.auxiliary_loss
        loss = build_auxiliary_loss(name, **model_args.auxiliary_options(model.config))
        model.add_auxiliary_loss(name, loss, model_args.alignment_weight)
        parts += [AUXILIARY] * bool(list(loss.parameters()))
    rates = learning_rates(parts, training_args)
    logger.info("What trains:\n%s", trainable_table(model, rates))

    make_dataset = partial(
        LLaVADataset,
        tokenizer=tokenizer,
        image_processor=image_processor,
        image_folder=data_args.image_folder,
        video_folder=data_args.video_folder,
        conversation=conv_templates[model_args.version],
        label_mask=data_args.label_mask,
        model_max_length=training_args.model_max_length,
        video_frames=data_args.video_frames,
        video_fps=data_args.video_fps,
        force_sample=data_args.force_sample,
        align_text=model_args.use_alignment_loss,
    )
    dataset = make_dataset(records)
    held_out = data_args.eval_data_path and make_dataset(
        load_records(data_args.eval_data_path, seed=training_args.seed)
    )
    trainer = LLaVATrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=held_out,
        data_collator=PackedCollator(3 * image_processor.patch_size**2),
        processing_class=tokenizer,
        learning_rates=rates,
        bad_samples=BadSampleLedger(data_args.max_bad_samples, len(dataset)),
    )
    if data_args.eval_tasks:
        add_tasks(trainer, data_args, image_processor)
    if trainer.args.should_save:
        add_start(
            training_args.output_dir,
            step=step_of(checkpoint) if checkpoint else 0,
            arguments={
                "model": asdict(model_args),
                "data": asdict(data_args),
                "training": training_args.to_sanitized_dict(),
            },
            data_path=data_args.data_path,
            records=records,
            world_size=training_args.world_size,
        )
    return trainer, checkpoint


def shared_choice(args: TrainingArguments, records: Records | None = None) -> str | None:
    """The checkpoint to go on from. The first process chooses: on a network file system others may see less. What it
    refuses all refuse: the others would wait for it.

    Args:
        records: those of this start, where they must be the ones that the checkpoint was trained on.
    """
    checkpoint = mistake = None
    if args.process_index == 0:
        try:
            checkpoint = last_complete_checkpoint(args.output_dir, remove=True)
            if checkpoint and records is not None:
                check_same_data(args.output_dir, records, args.to_sanitized_dict(), args.world_size)
        except (OSError, ValueError) as error:
            mistake = str(error)
    checkpoint, mistake = broadcast_object_list([checkpoint, mistake])
    if mistake:
        raise ValueError(mistake)
    if checkpoint and not Path(checkpoint).is_dir():
        raise ValueError(
            f"{checkpoint}, from which the first process goes on, is not seen by process {args.process_index}. All "
            "nodes need the same --output_dir, on a shared file system."
        )
    return checkpoint


def add_tasks(trainer: LLaVATrainer, data_args: DataArguments, image_processor: ImageProcessor) -> None:
    """Let the trainer run `--eval_tasks`."""
    args = trainer.args
    parts = RunParts(
        config=trainer.model.config,
        tokenizer=trainer.processing_class,
        image_processor=image_processor,
        image_folder=data_args.image_folder,
        limit=data_args.eval_tasks_limit,
        batch_size=args.eval_batch_size,
        rank=args.process_index,
        num_ranks=args.world_size,
        synced=is_sharded(trainer.model),
        over_processes=trainer.sum_over_processes,
    )
    tasks = build_tasks(data_args.eval_tasks, parts)
    trainer.add_callback(Tasks(trainer, tasks, data_args.eval_tasks_steps))


def run_stage(trainer: LLaVATrainer, checkpoint: str | None) -> None:
    """Train to the end, then save the model and the trainer's history into the output folder. A run that SIGTERM ends
    leaves a checkpoint instead."""
    if checkpoint is not None:
        logger.info("Continuing from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.bad_samples.log_summary()
    if trainer.preemption.stopped:
        return
    trainer.save_state()
    trainer.save_model()
    if trainer.args.should_save:
        flush(trainer.args.output_dir)


def load_model(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Any:
    """The LLM or LLaVA checkpoint with tower and adapter.

    From a bare LLM the tower comes from `--vision_tower` and the adapter is fresh (or `--pretrain_mm_mlp_adapter`'s).
    A LLaVA checkpoint brings its own tower, weights included: `--vision_tower` must then name the same one.
    """
    config = load_config(model_args.model_name_or_path)
    name = (
        with_weights(model_args.vision_tower, model_args.vision_tower_pretrained) if model_args.vision_tower else None
    )
    has_tower = getattr(config, "mm_vision_tower", None) is not None
    if has_tower:
        if name is not None and name not in (config.mm_vision_tower, config.mm_vision_tower.partition(":")[0]):
            raise ValueError(
                f"--vision_tower {name}, but {model_args.model_name_or_path} holds its own tower, which began as "
                f"{config.mm_vision_tower}. Leave the flag out, or start from the bare LLM."
            )
        complete_vision_config(config)
        config.mm_vision_config |= model_args.tower_options()
        take_llava_keys(config, model_args.llava_keys())
        config.mm_image_processor |= data_args.processor_options()
        config.mm_base_model = model_args.model_name_or_path
    elif name is None:
        raise ValueError(f"--vision_tower is missing, and {model_args.model_name_or_path} holds no tower of its own.")
    dtype = weights_dtype(bf16=training_args.bf16, deepspeed=training_args.deepspeed, use_cpu=training_args.use_cpu)
    model = load_weights(
        model_args.model_name_or_path,
        config,
        dtype=dtype,
        attn_implementation=training_args.attn_implementation,
        quantization_config=training_args.quantization(dtype),
    )
    if not has_tower:
        attach_vision(
            model,
            name,
            base_model=model_args.model_name_or_path,
            projector_type=model_args.mm_projector_type,
            dtype=dtype,
            adapter_file=model_args.pretrain_mm_mlp_adapter,
            tower_options=model_args.tower_options(),
            processor_options=data_args.processor_options(),
            llava_keys=model_args.llava_keys(),
        )
    elif model_args.pretrain_mm_mlp_adapter:
        load_adapter_file(model.get_model().mm_projector, model_args.pretrain_mm_mlp_adapter)
    if training_args.bits < 16:  # the Trainer moves no quantised model, and tower and adapter came later
        model.get_model().vision_tower.to(model.device)
        model.get_model().mm_projector.to(model.device)
    return model


def weights_dtype(*, bf16: bool, deepspeed: Any, use_cpu: bool) -> torch.dtype:
    """Without DeepSpeed a CPU computes in float32 all the same, and what trains becomes float32 (`hold_in_float32`);
    DeepSpeed turns everything into bfloat16, and has float32 copies."""
    return torch.bfloat16 if bf16 and (deepspeed or not use_cpu) else torch.float32


def load_tokenizer(path: str, model_max_length: int) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer, padding (where anything still pads) on the right."""
    return AutoTokenizer.from_pretrained(path, model_max_length=model_max_length, padding_side="right")


def learning_rates(parts: list[str], args: TrainingArguments) -> dict[str, float]:
    """Part -> learning rate, for the parts that train."""
    own = {
        "mm_mlp_adapter": args.mm_projector_lr,
        "mm_vision_tower": args.mm_vision_tower_lr,
        AUXILIARY: args.mm_projector_lr,  # as fresh as the adapter
    }
    return {part: args.learning_rate if own.get(part) is None else own[part] for part in parts}


def record_in_config(
    config: Any, model_args: ModelArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> None:
    """LLaVA's config keys about training, and the template by which a chat must talk to the model."""
    config.use_mm_proj = True
    config.mm_use_im_start_end = config.mm_use_im_patch_token = False
    config.mm_tunable_parts = model_args.mm_tunable_parts
    config.mm_projector_lr = training_args.mm_projector_lr
    config.mm_vision_tower_lr = training_args.mm_vision_tower_lr
    config.mm_conversation_template = model_args.version
    config.tokenizer_padding_side = tokenizer.padding_side
    config.tokenizer_model_max_length = training_args.model_max_length


if __name__ == "__main__":
    main()
