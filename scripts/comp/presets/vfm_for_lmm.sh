# shellcheck shell=bash disable=SC2034 # a table of values, read by common.sh
# A tower as it is, for an LMM (paper, Tab. 2 and 12): frozen, with a fresh adapter and LLaMA-3-8B, which train together for one
# epoch on LLaVA's instructions: 5197 steps of 128 are LLaVA-1.5's 665K. 576 tokens an image: padded to a square, 48 x 48 patches.
# The tower is VISION_TOWER: CoMP's before Stage III, or an original VFM's with ROPE_FROM=never. scripts/comp/vfm_for_lmm.sh TOWER.
# The table's learning rates are lost in our copy of the paper, but for the adapter's being 8 times the LLM's: these are those
# of AIMv2's paper, whose setting it says it follows.
VISION_TOWER=${VISION_TOWER:-comp-siglip:runs/comp_1b_siglip/stage2_native}
LLM=${LLM:-meta-llama/Meta-Llama-3-8B-Instruct}
TEMPLATE=${TEMPLATE:-llava_llama_3}
STAGES=(stage3_sft)
STAGE3_DATA=${STAGE3_DATA:-${DATA_ROOT:-data}/llava_1_5.yaml}
STAGE3_SIZE=${STAGE3_SIZE:-672} # px: 48 patches of 14; 768 for a tower of patch 16
STAGE3_LR=${STAGE3_LR:-1e-5}
STAGE3_ADAPTER_LR=${STAGE3_ADAPTER_LR:-8e-5}
WARMUP=${WARMUP:-0.05}
source scripts/comp/paper.sh

recipe_stage3_sft() {
  GLOBAL_BATCH=128 BATCH_PER_DEVICE=16
  recipe stage3_sft \
    --version "$TEMPLATE" \
    --data_path "$STAGE3_DATA" \
    --mm_tunable_parts mm_mlp_adapter,mm_language_model \
    --learning_rate "$STAGE3_LR" --mm_projector_lr "$STAGE3_ADAPTER_LR" \
    --pad_to_square True --force_resize "$STAGE3_SIZE" \
    --max_num_vistoken 576 \
    --model_max_length 2048
}
