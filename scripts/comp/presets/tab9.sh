# shellcheck shell=bash disable=SC2034,SC2153 # switches, read by paper.sh; ROW is common.sh's
# Two LLMs, both without the alignment loss (paper, Tab. 9).
ROWS="qwen2 qwen2_5"
ALIGNMENT_STAGES=""
case $ROW in qwen2) LLM=${LLM:-Qwen/Qwen2-0.5B-Instruct} TEMPLATE=${TEMPLATE:-qwen_2} ;; esac
source scripts/comp/paper.sh
