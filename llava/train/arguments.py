"""Every training flag: LLaVA's own names, CoMP's beside them. Names that scripts still use: `old_flags.py`."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, field, fields
from typing import Any

import transformers
from transformers import HfArgumentParser

from llava.data.video import FrameRule
from llava.model.multimodal_encoder.base import TOWER_OPTIONS
from llava.train.lora import LoraArguments
from llava.train.old_flags import current_flags

# Flags of the auxiliary loss that would change nothing, by the --auxiliary_loss or --alignment_mode that is chosen.
UNREAD_BY = {
    "prior_softmax": ("alignment_row_strength",),
    "sinkhorn": ("alignment_prior_temperature",),
    "contrastive": (
        "alignment_mode",
        "alignment_row_strength",
        "alignment_prototypes",
        "alignment_epsilon",
        "alignment_prior_temperature",
    ),
}

# transformers' flags that would break what a run here promises: the only value each may have, and why.
FIXED_FLAGS = {
    "resume_from_checkpoint": (None, "a run continues by itself from the last checkpoint in its --output_dir."),
    "train_sampling_strategy": (
        "random",
        "the order is always random, every sample once an epoch; --group_by_modality_length and --pack_to_max_length "
        "are there instead.",
    ),
    "save_only_model": (False, "a checkpoint without its optimizer cannot be gone on from."),
    "ignore_data_skip": (False, "a run that goes on would see some samples twice and others never."),
    "label_smoothing_factor": (0.0, "the decoding loss has none."),
    "auto_find_batch_size": (False, "another batch size would be another recipe; set a smaller one and accumulate."),
    "load_best_model_at_end": (False, "checkpoints of an adapter cannot be loaded so; take the one that you want."),
    "remove_unused_columns": (False, "the model takes every key of a batch."),
}


@dataclass(kw_only=True)
class PlainTowerArguments:
    """LLaVA's flags of its own towers (`openai/clip-...`, `google/siglip-...`), which are keys of the config, too.

    Unset means the checkpoint's; where the run starts a tower, the defaults of `PlainTowerFactory.starting_keys`, which
    its config then records. A tower of native resolution reads none of them.
    """

    image_aspect_ratio: str | None = field(default=None, metadata={"help": "square | pad | anyres | anyres_max_N."})
    image_grid_pinpoints: str | None = field(
        default=None, metadata={"help": "Canvases of anyres: pairs of pixels, or (1x1),...,(6x6) tiles."}
    )
    mm_patch_merge_type: str | None = field(
        default=None, metadata={"help": "flat, or spatial with _unpad, _maxpool2x2, _nobase."}
    )
    mm_newline_position: str | None = field(
        default=None, metadata={"help": "In a video: grid (a fresh tower's) | frame | one_token | no_token."}
    )
    mm_spatial_pool_mode: str | None = field(
        default=None, metadata={"help": "Of a video's frames: average | max | bilinear."}
    )
    mm_spatial_pool_stride: int | None = field(default=None, metadata={"help": "By how much frames are pooled."})
    mm_vision_select_layer: int | None = field(
        default=None, metadata={"help": "CLIP's hidden state; a fresh tower's is -2."}
    )
    mm_vision_select_feature: str | None = field(default=None, metadata={"help": "patch | cls_patch."})

    def llava_keys(self) -> dict[str, Any]:
        """Those that were set."""
        values = {item.name: getattr(self, item.name) for item in fields(PlainTowerArguments)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class ModelArguments(PlainTowerArguments):
    """The parts of the model, which of them train, and the auxiliary loss."""

    model_name_or_path: str = field(metadata={"help": "LLM or LLaVA checkpoint to start from: folder or hub id."})
    version: str = field(default="qwen_2_5", metadata={"help": "Conversation template (llava.conversation)."})
    vision_tower: str | None = field(
        default=None, metadata={"help": "Tower name, or name:weights, e.g. comp-siglip:./my/siglip."}
    )
    vision_tower_pretrained: str | None = field(
        default=None, metadata={"help": "The tower's starting weights; the same as the part after the colon."}
    )
    mm_projector_type: str = field(default="downsample_mlp", metadata={"help": "Projector (llava.projectors)."})
    pretrain_mm_mlp_adapter: str | None = field(default=None, metadata={"help": "A Stage-I mm_projector.bin."})
    mm_tunable_parts: str = field(
        default="mm_mlp_adapter,mm_vision_tower,mm_language_model",
        metadata={"help": "Comma list of the parts that train: mm_mlp_adapter, mm_vision_tower, mm_language_model."},
    )
    use_rope: bool | None = field(default=None, metadata={"help": "RoPE-2D in the tower; unset = the checkpoint's."})
    position_embedding_kind: str | None = field(
        default=None, metadata={"help": "learned | sincos | none; unset = the checkpoint's (Tab. 5)."}
    )
    position_interpolation: str | None = field(
        default=None, metadata={"help": "bilinear | bicubic, each also with _antialias; unset = the checkpoint's."}
    )
    position_embedding_order: str | None = field(
        default=None, metadata={"help": "block | raster; unset = the checkpoint's."}
    )
    use_alignment_loss: bool = field(default=False, metadata={"help": "Add CoMP's alignment loss (Sec. 2.3)."})
    auxiliary_loss: str = field(
        default="alignment", metadata={"help": "The loss that --use_alignment_loss adds: alignment | contrastive."}
    )
    alignment_weight: float = field(default=0.05, metadata={"help": "Its weight in the total."})
    alignment_mode: str = field(default="prior_softmax", metadata={"help": "Target rule: prior_softmax | sinkhorn."})
    alignment_row_strength: float = field(
        default=1.0, metadata={"help": "sinkhorn only: 1 = the paper's equation, 0 = a plain softmax."}
    )
    alignment_prototypes: str = field(
        default="word_embeddings", metadata={"help": "word_embeddings | learnable (as many, of a uniform prior)."}
    )
    alignment_temperature: float = field(default=0.005, metadata={"help": "τ, of the visual side's softmax."})
    alignment_epsilon: float = field(default=0.005, metadata={"help": "ε, of the text side."})
    alignment_prior_temperature: float = field(default=0.05, metadata={"help": "prior_softmax only: of the prior."})
    word_prior: str | None = field(
        default=None, metadata={"help": "File made by python -m comp_patches.word_prior; uniform = without a prior."}
    )

    def __post_init__(self):
        if self.vision_tower_pretrained and not self.vision_tower:
            raise ValueError("--vision_tower_pretrained needs --vision_tower, the name of the tower it is for.")
        if self.use_alignment_loss:
            self._check_alignment()

    def _check_alignment(self) -> None:
        aligns_words = self.auxiliary_loss == "alignment" and self.alignment_prototypes == "word_embeddings"
        if aligns_words and self.word_prior is None:
            raise ValueError(
                "--use_alignment_loss needs --word_prior FILE. Make one with: python -m comp_patches.word_prior "
                "--data_path MIXTURE --tokenizer MODEL --output FILE"
            )
        choice = "auxiliary_loss" if self.auxiliary_loss != "alignment" else "alignment_mode"
        for name in UNREAD_BY.get(getattr(self, choice), ()):
            if getattr(self, name) != getattr(type(self), name):  # a field's default is the class's
                raise ValueError(
                    f"--{name} {getattr(self, name)}: --{choice} {getattr(self, choice)} does not read it. "
                    "Leave one of the two out."
                )

    def tower_options(self) -> dict[str, Any]:
        """The tower's own options that were set; the rest is the checkpoint's to say."""
        return {name: getattr(self, name) for name in TOWER_OPTIONS if getattr(self, name) is not None}

    def auxiliary_options(self, config: Any) -> dict[str, Any]:
        """The options of the registered loss `auxiliary_loss`, for an LLM of this config."""
        if self.auxiliary_loss == "contrastive":
            return {"temperature": self.alignment_temperature}
        no_prior = self.word_prior == "uniform" or self.alignment_prototypes == "learnable"
        return {
            "prior": None if no_prior else self.word_prior,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "prototypes": self.alignment_prototypes,
            "mode": self.alignment_mode,
            "row_strength": self.alignment_row_strength,
            "temperature": self.alignment_temperature,
            "epsilon": self.alignment_epsilon,
            "prior_temperature": self.alignment_prior_temperature,
        }


@dataclass
class DataArguments:
    """What is read, and how images and turns become tokens."""

    data_path: str = field(metadata={"help": "Records (.json, .jsonl, .parquet, a folder), or a YAML mixture."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder that record paths are relative to."})
    video_folder: str | None = field(default=None, metadata={"help": "Folder of videos; unset = --image_folder."})
    force_resize: str | None = field(
        default=None,
        metadata={
            "help": "Squash every image to a square of this side in px; pretrained = the VFM's; none = native; "
            "unset = the checkpoint's."
        },
    )
    pad_to_square: bool = field(
        default=False, metadata={"help": "Before --force_resize: every image in the middle of a square, not squashed."}
    )
    min_num_vistoken: int | None = field(default=None, metadata={"help": "Fewest visual tokens of an image."})
    max_num_vistoken: int | None = field(default=None, metadata={"help": "Most visual tokens of an image."})
    video_frames: int = field(
        default=8, metadata={"help": "Frames of a video, evenly spaced; with --video_fps the most; 0 = no limit."}
    )
    video_fps: float | None = field(
        default=None, metadata={"help": "Frames of each second instead; unset = always --video_frames (of 0: 1)."}
    )
    force_sample: bool = field(
        default=False, metadata={"help": "Exactly --video_frames, of shorter videos some several times."}
    )
    label_mask: str = field(default="answers", metadata={"help": "answers | llava (upstream's own mask)."})
    max_bad_samples: float = field(
        default=0.01, metadata={"help": "Abort when more than this share of the samples seen was bad."}
    )
    allow_changed_data: bool = field(
        default=False, metadata={"help": "Continue a run though its data are others than it had so far."}
    )
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Held-out data like --data_path, for their losses by --eval_strategy."}
    )
    eval_tasks: str | None = field(
        default=None, metadata={"help": "Comma list of FILE (held-out questions) or KIND:WHAT (llava.evaluations)."}
    )
    eval_tasks_steps: int | None = field(
        default=None, metadata={"help": "Steps between two runs of --eval_tasks; unset = after the last step only."}
    )
    eval_tasks_limit: int | None = field(default=None, metadata={"help": "The first so many of a task's questions."})

    def __post_init__(self):
        if self.force_resize in ("None", "0"):  # the release's way to say native
            self.force_resize = "none"
        if self.force_resize not in (None, "none", "pretrained") and not self.force_resize.isdigit():
            raise ValueError(f"--force_resize {self.force_resize!r}: expected a side in px, `pretrained` or `none`.")
        self.frame_rule()  # refuses what makes no sense
        if not 0 <= self.max_bad_samples <= 1:
            raise ValueError(f"--max_bad_samples {self.max_bad_samples}: expected a share between 0 and 1.")
        for name in ("eval_tasks_steps", "eval_tasks_limit"):
            value = getattr(self, name)
            if value is not None and (value < 1 or not self.eval_tasks):
                raise ValueError(f"--{name} {value}: expected a number of at least 1, beside --eval_tasks FILE.")

    def frame_rule(self) -> FrameRule:
        """Which frames stand for a video."""
        return FrameRule(self.video_frames, self.video_fps, self.force_sample)

    def processor_options(self) -> dict[str, Any]:
        """The image processor's options that were set; the rest is the checkpoint's to say."""
        options = {"min_num_vistoken": self.min_num_vistoken, "max_num_vistoken": self.max_num_vistoken}
        options = {name: value for name, value in options.items() if value is not None}
        if self.pad_to_square:
            options["pad_to_square"] = True
        if self.force_resize is not None:
            sides = {"none": None, "pretrained": "pretrained"}
            options["force_resize"] = sides[self.force_resize] if self.force_resize in sides else int(self.force_resize)
        return options


@dataclass
class TrainingArguments(LoraArguments, transformers.TrainingArguments):
    """transformers' arguments with LLaVA's defaults, a learning rate per part, and LoRA's."""

    optim: str = field(default="adamw_torch")
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: the model takes all keys."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Trade compute for memory, tower and LLM."})
    use_cache: bool = field(
        default=True, metadata={"help": "Written into the config for generation; training has none."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log a mean in place of a loss that is no number; such a step ends the run."}
    )
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, ... or none."})
    warmup_ratio: float = field(default=0.0, metadata={"help": "Share of all steps that warm up."})
    model_max_length: int = field(default=4096, metadata={"help": "Longest sample in tokens, visual ones included."})
    mm_projector_lr: float | None = field(default=None, metadata={"help": "Of the adapter; unset = --learning_rate."})
    mm_vision_tower_lr: float | None = field(default=None, metadata={"help": "Of the tower; unset = --learning_rate."})
    group_by_modality_length: bool = field(default=False, metadata={"help": "Steps of one modality, like lengths."})
    pack_to_max_length: bool = field(
        default=False,
        metadata={"help": "A sample's place in a batch is taken by as many as fit into --model_max_length tokens."},
    )
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Samples of a device at once in evaluation; unset = as in training."}
    )
    attn_implementation: str = field(default="auto", metadata={"help": "Of LLM: auto | sdpa | flash_attention_2."})

    def __post_init__(self):
        for name, (kept, reason) in FIXED_FLAGS.items():
            if getattr(self, name) != kept:
                raise ValueError(f"--{name} {getattr(self, name)}: {reason} Leave the flag out.")
        # transformers renamed the flag; LLaVA's scripts and ours keep LLaVA's name.
        self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.warmup_ratio and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # transformers reads a value below 1 as a share
        super().__post_init__()


class _Parser(HfArgumentParser):
    """Says what is wrong in one line, without the hundreds of flags."""

    def error(self, message: str) -> None:
        self.exit(2, f"{message}\n")


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Flags (default: the command line's) -> the three groups. Older ones are translated, see `old_flags`."""
    parser = _Parser((ModelArguments, DataArguments, TrainingArguments))
    known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    *groups, unknown = parser.parse_args_into_dataclasses(
        args=current_flags(sys.argv[1:] if argv is None else argv), return_remaining_strings=True
    )
    if unknown:
        nearest = difflib.get_close_matches(unknown[0].removeprefix("--").partition("=")[0], known, n=1)
        hint = f" Did you mean --{nearest[0]}?" if nearest else " --help lists all flags."
        raise ValueError(f"{unknown[0]} is no flag of the training.{hint}")
    _, data, training = groups
    if (data.eval_data_path is not None) != (training.eval_strategy != "no"):
        raise ValueError(
            f"--eval_strategy {training.eval_strategy.value} with --eval_data_path {data.eval_data_path}: losses on "
            "held-out data need both, for instance --eval_strategy steps --eval_steps 500 --eval_data_path FILE."
        )
    return tuple(groups)
