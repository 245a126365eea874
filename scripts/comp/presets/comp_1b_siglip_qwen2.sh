# shellcheck shell=bash
# Qwen2-0.5B in the place of Qwen2.5 (paper, Tab. 9): without the alignment loss, as all of that table.
LLM=${LLM:-Qwen/Qwen2-0.5B-Instruct}
TEMPLATE=${TEMPLATE:-qwen_2}
ALIGNMENT_STAGES=${ALIGNMENT_STAGES-}
source scripts/comp/paper.sh
