# shellcheck shell=bash
# CLIP-L-336 in the 1B model (paper, Tab. 7).
VISION_TOWER=${VISION_TOWER:-comp-clip:openai/clip-vit-large-patch14-336}
source scripts/comp/paper.sh
