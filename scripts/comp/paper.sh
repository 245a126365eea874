# shellcheck shell=bash disable=SC2034 # a table of values, read by common.sh
# The paper's recipe (Sec. 2.4, Tab. 11; learning rates from the authors' scripts) and the switches that its ablations turn.
# A preset names the tower and the LLM, turns a switch where it differs, and sources this file. Every batch is for all GPUs
# together: 8 H100 in the paper.

VISION_TOWER=${VISION_TOWER:-comp-siglip:google/siglip-so400m-patch14-384}
LLM=${LLM:-Qwen/Qwen2.5-0.5B-Instruct}
TEMPLATE=${TEMPLATE:-qwen_2_5}
DATA_ROOT=${DATA_ROOT:-data}
STAGE2_DATA=${STAGE2_DATA:-$DATA_ROOT/stage2.yaml}
STAGE3_DATA=${STAGE3_DATA:-$DATA_ROOT/stage3.yaml}

# Which stages there are. A stage starts from the one before it in this list, the first from LLM and tower.
((${#STAGES[@]})) || STAGES=(stage1 stage2_fixed stage2_native stage3_sft)
ROPE_FROM=${ROPE_FROM:-stage2}                       # stage1 | stage2 | never: since when RoPE-2D turns
POSITION_EMBEDDING=${POSITION_EMBEDDING:-learned}    # learned | sincos | none
STAGE1_SIZE=${STAGE1_SIZE:-pretrained}               # of Stage I: px, `pretrained` or `none` (native)
STAGE2_SIZE=${STAGE2_SIZE:-1024}                     # of Stage II's first half
STAGE3_SIZE=${STAGE3_SIZE:-none}                     # of Stage III
STAGE2_PARTS=${STAGE2_PARTS:-mm_vision_tower,mm_mlp_adapter,mm_language_model}
WARMUP=${WARMUP:-0.03}                               # share of a stage's steps
STAGE3_LR=${STAGE3_LR:-1e-5}                         # of the LLM in Stage III
STAGE3_ADAPTER_LR=${STAGE3_ADAPTER_LR:-1e-5}
STAGE3_TOWER_LR=${STAGE3_TOWER_LR:-2e-5}             # 5e-6 where VISION_TOWER has been through CoMP already
ALIGNMENT_STAGES=${ALIGNMENT_STAGES-stage1 stage2_fixed stage2_native} # empty: nowhere
((${#ALIGNMENT[@]})) || ALIGNMENT=(--alignment_weight 0.05 --word_prior "$WORD_PRIOR")

EVERY_STAGE=(
  --image_folder "$DATA_ROOT"
  --num_train_epochs 1
  --adam_beta1 0.9 --adam_beta2 0.999 --adam_epsilon 1e-8
  --weight_decay 0.
  --max_grad_norm 1.0
  --lr_scheduler_type cosine
  --warmup_ratio "$WARMUP"
  --min_num_vistoken 4
  --gradient_checkpointing True
  --group_by_modality_length True
  --dataloader_num_workers 8
  --logging_steps 1
  --save_strategy steps --save_steps 1000 --save_total_limit 1
  --report_to tensorboard
  --seed 42
)

# Stage I: the adapter alone learns to speak to the frozen LLM, at the size and with the positions the tower knows.
recipe_stage1() {
  GLOBAL_BATCH=256 BATCH_PER_DEVICE=32
  recipe stage1 \
    --version plain \
    --data_path "$DATA_ROOT/stage1.yaml" \
    --mm_tunable_parts mm_mlp_adapter \
    --learning_rate 1e-3 \
    --force_resize "$STAGE1_SIZE" \
    --max_num_vistoken 1024 \
    --model_max_length 4096
}

# Stage II, first half: everything trains, at one high resolution; RoPE-2D joins the learned positions.
recipe_stage2_fixed() { recipe_stage2 stage2_fixed "$STAGE2_SIZE"; }

# Stage II, second half: the same, every image at its own size and shape.
recipe_stage2_native() { recipe_stage2 stage2_native none; }

recipe_stage2() { # STAGE SIZE
  GLOBAL_BATCH=256 BATCH_PER_DEVICE=16
  recipe "$1" \
    --version "$TEMPLATE" \
    --data_path "$STAGE2_DATA" \
    --mm_tunable_parts "$STAGE2_PARTS" \
    --learning_rate 2e-5 --mm_vision_tower_lr 1e-4 --mm_projector_lr 5e-3 \
    --force_resize "$2" \
    --max_num_vistoken 3000 \
    --model_max_length 8000
}

# Stage III: instruction tuning at native resolution, on the language loss alone.
recipe_stage3_sft() {
  GLOBAL_BATCH=128 BATCH_PER_DEVICE=16
  recipe stage3_sft \
    --version "$TEMPLATE" \
    --data_path "$STAGE3_DATA" \
    --mm_tunable_parts mm_vision_tower,mm_mlp_adapter,mm_language_model \
    --learning_rate "$STAGE3_LR" --mm_vision_tower_lr "$STAGE3_TOWER_LR" --mm_projector_lr "$STAGE3_ADAPTER_LR" \
    --force_resize "$STAGE3_SIZE" \
    --max_num_vistoken 3000 \
    --model_max_length 4096
}

recipe() { # STAGE FLAGS
  local stage=$1
  start_of "$stage"
  RECIPE=("${START[@]}" "${@:2}" --use_rope "$(rope_in "$stage")")
  [[ $POSITION_EMBEDDING == learned ]] || RECIPE+=(--position_embedding_kind "$POSITION_EMBEDDING")
  if [[ " $ALIGNMENT_STAGES " == *" $stage "* ]]; then
    RECIPE+=(--use_alignment_loss True "${ALIGNMENT[@]}")
  else
    RECIPE+=(--use_alignment_loss False)
  fi
  RECIPE+=("${EVERY_STAGE[@]}")
}

rope_in() { # STAGE -> True | False
  case $ROPE_FROM/$1 in
    stage1/* | stage2/stage2_* | stage2/stage3_*) printf True ;;
    *) printf False ;;
  esac
}

case $ROPE_FROM in stage1 | stage2 | never) ;; *) die "ROPE_FROM=$ROPE_FROM: expected stage1, stage2 or never" ;; esac
for word in $ALIGNMENT_STAGES; do
  case $word in
    stage1 | stage2_fixed | stage2_native | stage3_sft) ;;
    *) die "ALIGNMENT_STAGES=$ALIGNMENT_STAGES: expected stages, $word is none" ;;
  esac
done
