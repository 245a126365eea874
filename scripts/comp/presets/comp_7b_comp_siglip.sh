# shellcheck shell=bash
# CoMP-MM-7B with a star (paper, Tab. 1): its tower is the CoMP-SigLIP of the 1B model and knows RoPE-2D, native sizes and the
# LLM's language already. As the authors' script for such a tower: native and with RoPE-2D from Stage I, one Stage II, no
# alignment loss, the tower at 5e-6 in Stage III. (That script is for the 1B model; they released none for 7B.)
LLM=${LLM:-Qwen/Qwen2.5-7B-Instruct}
VISION_TOWER=${VISION_TOWER:-comp-siglip:SliMM-X/CoMP-SigLIP-So400M}
STAGES=(stage1 stage2_native stage3_sft)
ROPE_FROM=${ROPE_FROM:-stage1}
STAGE1_SIZE=${STAGE1_SIZE:-none}
STAGE3_TOWER_LR=${STAGE3_TOWER_LR:-5e-6}
ALIGNMENT_STAGES=${ALIGNMENT_STAGES-}
source scripts/comp/paper.sh
