# shellcheck shell=bash disable=SC2034 # a table of values, read by common.sh
# The embedded default: the whole of CoMP on a laptop's CPU, with data that playground/ draws and the two small models it ships.
# The stages, losses and freezing are the paper's; sizes, steps and learning rates are those of a model of a few million parameters.

STAGES=(stage1 stage2_fixed stage2_native stage3_sft)
RUN_MISSING_STAGES=1 # Minutes, so a missing predecessor is simply run.
AFTER_TRAINING=scripts/comp/evaluate_embedded.sh
VISION_TOWER=${VISION_TOWER:-comp-siglip:playground/models/tower}
LLM=${LLM:-playground/models/llm}
DATA_ROOT=${DATA_ROOT:-$RUN/data}
STAGE2_DATA=$DATA_ROOT/stage2.json
FIXED_SIZE=192       # px, of Stage II fixed
MAX_NUM_VISTOKEN=128 # of an image, in every stage

EVERY_STAGE=(
  --image_folder "$DATA_ROOT"
  --adam_beta1 0.9 --adam_beta2 0.999 --adam_epsilon 1e-8
  --weight_decay 0.
  --max_grad_norm 1.0
  --lr_scheduler_type cosine
  --warmup_ratio 0.03
  --min_num_vistoken 4
  --max_num_vistoken "$MAX_NUM_VISTOKEN"
  --model_max_length 512
  --gradient_checkpointing False
  --group_by_modality_length True
  --dataloader_num_workers 0
  --logging_steps 10
  --save_strategy steps --save_steps 50 --save_total_limit 1
  --report_to tensorboard
  --seed 42
)
WHOLE_MODEL=mm_vision_tower,mm_mlp_adapter,mm_language_model
ALIGNMENT=(--use_alignment_loss True --alignment_weight 0.05 --word_prior "$WORD_PRIOR")

# Draws the data that DATA_FILE belongs to, unless they are there; fails where another version of the playground drew them.
# Files without settings.json were not drawn here: they are the user's.
prepare_data() { # DATA_FILE
  if [[ -e $1 && ! -e $DATA_ROOT/settings.json ]]; then return 0; fi
  "$PYTHON" -m playground.make_data --output "$DATA_ROOT" >&2
}

recipe_stage1() {
  start_of stage1
  GLOBAL_BATCH=32 BATCH_PER_DEVICE=32
  RECIPE=(
    "${START[@]}"
    --version plain
    --data_path "$DATA_ROOT/stage1.json"
    --mm_tunable_parts mm_mlp_adapter
    --max_steps 400
    --learning_rate 3e-3
    --use_rope False
    --force_resize pretrained
    "${ALIGNMENT[@]}" "${EVERY_STAGE[@]}"
  )
}

recipe_stage2_fixed() { recipe_stage2 stage2_fixed --max_steps 80 --force_resize "$FIXED_SIZE"; }

recipe_stage2_native() { recipe_stage2 stage2_native --max_steps 420 --force_resize none; }

recipe_stage2() { # STAGE FLAGS
  start_of "$1"
  GLOBAL_BATCH=32 BATCH_PER_DEVICE=32
  RECIPE=(
    "${START[@]}"
    "${@:2}"
    --version qwen_2_5
    --data_path "$STAGE2_DATA"
    --mm_tunable_parts "$WHOLE_MODEL"
    --learning_rate 1e-3 --mm_vision_tower_lr 1e-3 --mm_projector_lr 2e-3
    --use_rope True
    "${ALIGNMENT[@]}" "${EVERY_STAGE[@]}"
  )
}

recipe_stage3_sft() {
  start_of stage3_sft
  GLOBAL_BATCH=32 BATCH_PER_DEVICE=32
  RECIPE=(
    "${START[@]}"
    --version qwen_2_5
    --data_path "$DATA_ROOT/stage3.json"
    --mm_tunable_parts "$WHOLE_MODEL"
    --max_steps 400
    --learning_rate 1e-3 --mm_vision_tower_lr 7e-4 --mm_projector_lr 1e-3
    --use_rope True
    --force_resize none
    --use_alignment_loss False
    "${EVERY_STAGE[@]}"
  )
}
