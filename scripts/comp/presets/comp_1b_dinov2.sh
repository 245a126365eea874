# shellcheck shell=bash
# CoMP-MM-DINOv2 (paper, Tab. 1 and 7).
VISION_TOWER=${VISION_TOWER:-comp-dinov2:facebook/dinov2-large}
source scripts/comp/paper.sh
