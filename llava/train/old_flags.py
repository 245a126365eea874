"""Flags of LLaVA-NeXT and of the CoMP authors' release that this training has under another name, or not at all.

One table: what becomes of each. Every such flag is taken with one warning line, or refused in one line that says what
to use instead. `docs/from_llava.md` shows the table, and a test holds the two equal.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Renamed:
    """The same under another name."""

    to: str


@dataclass(frozen=True)
class Tuning:
    """A switch of what trains, from before `--mm_tunable_parts`, which it is turned into."""


@dataclass(frozen=True)
class Unread:
    """Taken with its value, and then left alone; `why` says what does its work."""

    why: str


@dataclass(frozen=True)
class Only:
    """Taken with one value, which asks for nothing; any other is refused."""

    value: str
    instead: str


@dataclass(frozen=True)
class Gone:
    """Refused."""

    instead: str


_NO_RESAMPLER = "there are no resamplers; LLaVA-NeXT builds its own and does not call them."
_NO_DPO = "there is no preference tuning; train with this project, then use the package trl."
_BY_LENGTH = "use --group_by_modality_length."

OLD_FLAGS: dict[str, Renamed | Tuning | Unread | Only | Gone] = {
    # LLaVA-NeXT: the model
    "tune_mm_mlp_adapter": Tuning(),
    "freeze_backbone": Tuning(),
    "freeze_mm_mlp_adapter": Tuning(),
    "unfreeze_mm_vision_tower": Tuning(),
    "unfreeze_language_model": Unread("LLaVA does not read it either; use --mm_tunable_parts."),
    "model_class_name": Gone("the class is chosen by model_type in config.json."),
    "mm_use_im_start_end": Only("False", "no recipe used it; an old checkpoint that has it loads."),
    "mm_use_im_patch_token": Only("False", "no recipe used it; an old checkpoint that has it loads."),
    "mm_resampler_type": Only("None", _NO_RESAMPLER),
    "tune_mm_vision_resampler": Only("False", _NO_RESAMPLER),
    "freeze_mm_vision_resampler": Unread(_NO_RESAMPLER),
    "mm_spatial_pool_out_channels": Gone(_NO_RESAMPLER),
    "mm_mask_drop_mode": Gone(_NO_RESAMPLER),
    "mm_mask_drop_skip_percentage": Gone(_NO_RESAMPLER),
    "mm_mask_drop_ratio": Gone(_NO_RESAMPLER),
    "mm_mask_drop_ratio_upper": Gone(_NO_RESAMPLER),
    "mm_mask_drop_ratio_lower": Gone(_NO_RESAMPLER),
    "mm_perceiver_depth": Gone(_NO_RESAMPLER),
    "mm_perceiver_latents": Gone(_NO_RESAMPLER),
    "mm_perceiver_ff_mult": Gone(_NO_RESAMPLER),
    "mm_perceiver_pretrained": Gone(_NO_RESAMPLER),
    "mm_qformer_depth": Gone(_NO_RESAMPLER),
    "mm_qformer_latents": Gone(_NO_RESAMPLER),
    "mm_qformer_pretrained": Gone(_NO_RESAMPLER),
    "rope_scaling_factor": Gone("write rope_parameters into the LLM's config.json; it is kept."),
    "rope_scaling_type": Gone("write rope_parameters into the LLM's config.json; it is kept."),
    "s2": Only("False", "use a tower of native resolution, --vision_tower comp-siglip."),
    "s2_scales": Gone("use a tower of native resolution, --vision_tower comp-siglip."),
    "use_pos_skipping": Only("False", "positions are never skipped."),
    "pos_skipping_range": Unread("positions are never skipped."),
    "delay_load": Unread("LLaVA does not read it either."),
    "add_faster_video": Only("False", "use --video_frames; LLaVA's own code for it does not run."),
    "faster_token_stride": Unread("it belongs to --add_faster_video."),
    # LLaVA-NeXT: the data
    "lazy_preprocess": Unread("data are always read as they are needed."),
    "is_multimodal": Unread("a model with a tower is."),
    "early_mix_text": Only("False", "leave --group_by_modality_length out."),
    "frames_upbound": Renamed("video_frames"),
    "add_time_instruction": Only("False", "write the times into the records' questions."),
    "image_crop_resolution": Gone("it belongs to crop_split, which no recipe used; use anyres."),
    "image_split_resolution": Gone("it belongs to crop_split, which no recipe used; use anyres."),
    # LLaVA-NeXT: the training
    "cache_dir": Gone("set the environment variable HF_HOME."),
    "verbose_logging": Unread("every argument is in OUTPUT_DIR/run_card.md."),
    "mpt_attn_impl": Unread("LLaVA does not read it either."),
    "lora_weight_path": Unread("LLaVA does not read it either; python -m llava.merge_lora_weights merges them."),
    "group_by_modality_length_auto": Only("False", _BY_LENGTH),
    "group_by_varlen": Only("False", _BY_LENGTH),
    "trainer_mode": Only("regular", "there is no zeroth-order training."),
    "zo_eps": Unread("it belongs to --trainer_mode."),
    "zo_num_directions": Unread("it belongs to --trainer_mode."),
    "evaluation_strategy": Renamed("eval_strategy"),
    "dpo_alpha": Gone(_NO_DPO),
    "beta": Gone(_NO_DPO),
    "gamma": Gone(_NO_DPO),
    "generate_during_eval": Gone(_NO_DPO),
    "precompute_ref_log_probs": Gone(_NO_DPO),
    # The CoMP authors' release
    "loss_weight": Renamed("alignment_weight"),
    "word_dist_path": Renamed("word_prior"),
    "embed_temp": Renamed("alignment_temperature"),
    "word_temp": Renamed("alignment_prior_temperature"),
    "word_eps": Renamed("alignment_epsilon"),
    "use_scale_jitting": Only("False", "images keep their size."),
    "custom_visual_model": Gone("use --vision_tower comp-siglip:WEIGHTS, or comp-dinov2:WEIGHTS."),
    "spatial_merge_size": Only("2", "the adapter merges 2 x 2 patches."),
    "temporal_patch_size": Unread("an image is one frame, as in the release."),
    "use_deepstack": Only("False", "no recipe of CoMP used it."),
    "deepstack_type": Unread("it belongs to --use_deepstack."),
    "disable_mrope": Unread("a checkpoint's config says whether its LLM turns by M-RoPE (mm_mrope_section)."),
    "left_pad_training": Unread("rows are packed, so nothing is padded."),
    # transformers
    "activation_checkpointing": Renamed("gradient_checkpointing"),
}


def current_flags(argv: list[str]) -> list[str]:
    """The command line with today's flags alone."""
    current: list[str] = []
    tuning: dict[str, bool] = {}
    left = deque(argv)
    while left:
        argument = left.popleft()
        flag, equals, value = argument.removeprefix("--").partition("=")
        old = OLD_FLAGS.get(flag) if argument.startswith("--") else None
        if old is None:
            current.append(argument)
            continue
        if isinstance(old, Renamed):
            logger.warning("--%s is now --%s.", flag, old.to)
            current.append(f"--{old.to}{equals}{value}")
            continue
        if not equals and left and not left[0].startswith("--"):
            value = left.popleft()
        if isinstance(old, Tuning):
            tuning[flag] = _is_true(flag, value)
        elif isinstance(old, Unread):
            logger.warning("--%s is taken for old scripts' sake and not read: %s", flag, old.why)
        elif isinstance(old, Gone) or value.lower() != old.value.lower():
            raise ValueError(f"--{flag} {value or 'True'}: {old.instead} Leave the flag out.")
    return _with_parts(current, tuning) if tuning else current


def _with_parts(current: list[str], tuning: dict[str, bool]) -> list[str]:
    """LLaVA's rule: --mm_tunable_parts goes before all of these; without it, adapter and LLM train unless told
    otherwise, and the tower only if told so."""
    said = " ".join(f"--{name} {value}" for name, value in tuning.items())
    if any(argument.partition("=")[0] == "--mm_tunable_parts" for argument in current):
        logger.warning("%s: not read, since --mm_tunable_parts says what trains.", said)
        return current
    adapter_only = tuning.get("tune_mm_mlp_adapter", False)
    trains = {
        "mm_mlp_adapter": not tuning.get("freeze_mm_mlp_adapter", False),
        "mm_vision_tower": tuning.get("unfreeze_mm_vision_tower", False),
        "mm_language_model": not (adapter_only or tuning.get("freeze_backbone", False)),
    }
    parts = ",".join(part for part, wanted in trains.items() if wanted)
    logger.warning("%s is now --mm_tunable_parts %s.", said, parts)
    return [*current, "--mm_tunable_parts", parts]


def _is_true(flag: str, value: str) -> bool:
    known = {"": True, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if value.lower() not in known:
        raise ValueError(f"--{flag} {value!r}: expected True or False.")
    return known[value.lower()]
