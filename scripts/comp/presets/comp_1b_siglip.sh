# shellcheck shell=bash disable=SC2034 # a table of values, read by common.sh
# CoMP-MM-1B: SigLIP-So400M and Qwen2.5-0.5B, as in the paper (Sec. 2.4, Tab. 11; learning rates from the authors' scripts).
# Another tower or LLM of the same recipe: set VISION_TOWER or LLM. Every batch is for all GPUs together: 8 H100 in the paper.

STAGES=(stage1 stage2_fixed stage2_native stage3_sft)
VISION_TOWER=${VISION_TOWER:-comp-siglip:google/siglip-so400m-patch14-384}
LLM=${LLM:-Qwen/Qwen2.5-0.5B-Instruct}
STAGE3_TOWER_LR=${STAGE3_TOWER_LR:-2e-5} # 5e-6 where VISION_TOWER has been through CoMP already
DATA_ROOT=${DATA_ROOT:-data}
STAGE2_DATA=$DATA_ROOT/stage2.yaml

EVERY_STAGE=(
  --image_folder "$DATA_ROOT"
  --num_train_epochs 1
  --adam_beta1 0.9 --adam_beta2 0.999 --adam_epsilon 1e-8
  --weight_decay 0.
  --max_grad_norm 1.0
  --lr_scheduler_type cosine
  --warmup_ratio 0.03
  --min_num_vistoken 4
  --gradient_checkpointing True
  --group_by_modality_length True
  --dataloader_num_workers 8
  --logging_steps 1
  --save_strategy steps --save_steps 1000 --save_total_limit 1
  --report_to tensorboard
  --seed 42
)
WHOLE_MODEL=mm_vision_tower,mm_mlp_adapter,mm_language_model
ALIGNMENT=(--use_alignment_loss True --alignment_weight 0.05 --word_prior "$WORD_PRIOR")

# Stage I: the adapter alone learns to speak to the frozen LLM, at the size and with the positions the tower knows.
recipe_stage1() {
  GLOBAL_BATCH=256 BATCH_PER_DEVICE=32
  RECIPE=(
    --model_name_or_path "$LLM"
    --vision_tower "$VISION_TOWER"
    --mm_projector_type downsample_mlp
    --version plain
    --data_path "$DATA_ROOT/stage1.yaml"
    --mm_tunable_parts mm_mlp_adapter
    --learning_rate 1e-3
    --use_rope False
    --force_resize pretrained
    --max_num_vistoken 1024
    --model_max_length 4096
    "${ALIGNMENT[@]}" "${EVERY_STAGE[@]}"
  )
}

# Stage II, first half: everything trains, at one high resolution; RoPE-2D joins the learned positions.
recipe_stage2_fixed() {
  recipe_stage2 \
    --model_name_or_path "$LLM" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type downsample_mlp \
    --pretrain_mm_mlp_adapter "$RUN/stage1/mm_projector.bin" \
    --force_resize 1024
}

# Stage II, second half: the same, every image at its own size and shape.
recipe_stage2_native() {
  recipe_stage2 --model_name_or_path "$RUN/stage2_fixed" --force_resize none
}

recipe_stage2() { # FLAGS of the half
  GLOBAL_BATCH=256 BATCH_PER_DEVICE=16
  RECIPE=(
    "$@"
    --version qwen_2_5
    --data_path "$STAGE2_DATA"
    --mm_tunable_parts "$WHOLE_MODEL"
    --learning_rate 2e-5 --mm_vision_tower_lr 1e-4 --mm_projector_lr 5e-3
    --use_rope True
    --max_num_vistoken 3000
    --model_max_length 8000
    "${ALIGNMENT[@]}" "${EVERY_STAGE[@]}"
  )
}

# Stage III: instruction tuning at native resolution, on the language loss alone.
recipe_stage3_sft() {
  GLOBAL_BATCH=128 BATCH_PER_DEVICE=16
  RECIPE=(
    --model_name_or_path "$RUN/stage2_native"
    --version qwen_2_5
    --data_path "$DATA_ROOT/stage3.yaml"
    --mm_tunable_parts "$WHOLE_MODEL"
    --learning_rate 1e-5 --mm_vision_tower_lr "$STAGE3_TOWER_LR" --mm_projector_lr 1e-5
    --use_rope True
    --force_resize none
    --max_num_vistoken 3000
    --model_max_length 4096
    --use_alignment_loss False
    "${EVERY_STAGE[@]}"
  )
}
