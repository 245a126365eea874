# shellcheck shell=bash
# SigLIP-Base in the 1B model (paper, Tab. 7).
VISION_TOWER=${VISION_TOWER:-comp-siglip-base:google/siglip-base-patch16-384}
source scripts/comp/paper.sh
