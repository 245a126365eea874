"""DeepSpeed's ZeRO before a model is loaded: what its JSON must say, and what a run without a GPU needs."""

from __future__ import annotations

import warnings

from llava.train.arguments import TrainingArguments

GATHER = "stage3_gather_16bit_weights_on_model_save"


def prepare_zero(args: TrainingArguments) -> None:
    """Nothing without `--deepspeed`. A configuration that could not save the model is refused before the first step."""
    if not args.deepspeed:
        return
    zero = args.hf_deepspeed_config.config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get(GATHER):
        raise ValueError(
            f'--deepspeed {args.deepspeed}: under stage 3 the model is saved only with "{GATHER}": true in '
            '"zero_optimization". Add it, or take scripts/zero3.json.'
        )
    if zero.get("stage") == 3 and args.bits < 16:
        raise ValueError(
            f"--bits {args.bits} --deepspeed {args.deepspeed}: stage 3 cannot shard quantised weights. Take "
            "scripts/zero2.json, or leave --bits out."
        )
    # DeepSpeed's own calls, a line per collective and nothing that a user could change.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if args.use_cpu:
        _start_on_cpu()


def _start_on_cpu() -> None:
    """accelerate starts torch.distributed on the CPU but not deepspeed.comm, without which zero.Init sees one rank."""
    import deepspeed

    # An all-reduce in shared memory, for inference alone: training needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
