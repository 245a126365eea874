# shellcheck shell=bash
# CoMP-MM-AIMv2 (paper, Tab. 1 and 7).
VISION_TOWER=${VISION_TOWER:-comp-aimv2:apple/aimv2-large-patch14-336}
source scripts/comp/paper.sh
