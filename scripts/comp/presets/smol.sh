# shellcheck shell=bash
# The whole recipe at the size of one GPU: SigLIP-Base and SmolLM2-135M (a LLaMA), which talks ChatML as Qwen2 does.
VISION_TOWER=${VISION_TOWER:-comp-siglip-base:google/siglip-base-patch16-384}
LLM=${LLM:-HuggingFaceTB/SmolLM2-135M-Instruct}
TEMPLATE=${TEMPLATE:-qwen_2}
source scripts/comp/paper.sh
