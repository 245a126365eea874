# shellcheck shell=bash
# CoMP-MM-1B (paper, Tab. 1): SigLIP-So400M and Qwen2.5-0.5B, the recipe as it stands.
source scripts/comp/paper.sh
