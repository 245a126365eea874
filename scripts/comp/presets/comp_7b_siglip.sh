# shellcheck shell=bash
# CoMP-MM-7B (paper, Tab. 1): the original SigLIP-So400M and Qwen2.5-7B. The authors released no 7B script; batches and
# learning rates are the 1B model's.
LLM=${LLM:-Qwen/Qwen2.5-7B-Instruct}
source scripts/comp/paper.sh
