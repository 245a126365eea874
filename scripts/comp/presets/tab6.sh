# shellcheck shell=bash disable=SC2034,SC2153 # switches, read by paper.sh; ROW is common.sh's
# Where the alignment loss is on (paper, Tab. 6): DINOv2-L, with LLaVA-NeXT's data in Stage III.
ROWS="none fixed all"
VISION_TOWER=${VISION_TOWER:-comp-dinov2:facebook/dinov2-large}
STAGE3_DATA=${DATA_ROOT:-data}/llava_next.yaml
case $ROW in
  none) ALIGNMENT_STAGES="" ;;
  fixed) ALIGNMENT_STAGES="stage1 stage2_fixed" ;;
esac
source scripts/comp/paper.sh
