# shellcheck shell=bash disable=SC2034,SC2153 # switches, read by paper.sh; ROW is common.sh's
# What the alignment loss is made of (paper, Tab. 5b), on "the LLaVA-NeXT dataset combination": read here as Stage I and then
# Stage III on LLaVA-NeXT's data, the loss on in both, since the paper says no more.
ROWS="contrastive alignment no_prior no_word_embedding no_sinkhorn none"
STAGES=(stage1 stage3_sft)
STAGE3_DATA=${DATA_ROOT:-data}/llava_next.yaml
STAGE2_DATA=$STAGE3_DATA # whose words are counted
ALIGNMENT_STAGES="stage1 stage3_sft"
ALIGNMENT=(--alignment_weight 0.05 --word_prior "$WORD_PRIOR")
case $ROW in
  contrastive) ALIGNMENT=(--alignment_weight 0.05 --auxiliary_loss contrastive) ;;
  no_prior) ALIGNMENT=(--alignment_weight 0.05 --word_prior uniform) ;;
  no_word_embedding) ALIGNMENT=(--alignment_weight 0.05 --word_prior uniform --alignment_prototypes learnable) ;;
  no_sinkhorn) ALIGNMENT+=(--alignment_mode sinkhorn --alignment_row_strength 0) ;; # which is a plain softmax
  none) ALIGNMENT_STAGES="" ;;
esac
source scripts/comp/paper.sh
