# shellcheck shell=bash disable=SC2034,SC2153 # switches, read by paper.sh; ROW is common.sh's
# The way from a LLaVA-1.5-like baseline to CoMP (paper, Tab. 4): each row is the one before it and what its line names, but
# row 4 is an aside (row 5 goes on from row 3) and the rows 9 and 10 are 7 and 8 with DINOv2-L.
# What "scale up training data" (row 7) adds the paper does not list; here it is Stage III's LLaVA-OneVision part.
ROWS="1 2 3 4 5 6 7 8 9 10"
case $ROW in
  1 | 2 | 3 | 4) STAGES=(stage1 stage2_fixed stage3_sft) STAGE2_SIZE=576 STAGE3_SIZE=768 ;;
  5) STAGE2_SIZE=576 ;;
esac
case $ROW in
  1) ROPE_FROM=never ;;
  2) ROPE_FROM=stage1 ;;
  4) STAGE2_PARTS=mm_vision_tower,mm_mlp_adapter ;;
  9 | 10) VISION_TOWER=${VISION_TOWER:-comp-dinov2:facebook/dinov2-large} ;;
esac
case $ROW in 8 | 10) ;; *) ALIGNMENT_STAGES="" ;; esac
case $ROW in [1-6]) STAGE3_DATA=${DATA_ROOT:-data}/llava_next.yaml ;; esac
source scripts/comp/paper.sh
