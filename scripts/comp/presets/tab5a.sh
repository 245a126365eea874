# shellcheck shell=bash disable=SC2034,SC2153 # switches, read by paper.sh; ROW is common.sh's
# Position embeddings (paper, Tab. 5a). The first four rows fine-tune Qwen2-0.5B and SigLIP at once on LLaVA-NeXT's data; the
# last two are the whole recipe. For the four the paper gives no learning rates: the fresh adapter has Stage I's here, the
# rest Stage III's.
ROWS="learned_384 learned_768 rope_768 c_rope_768 rope_native c_rope_native"
case $ROW in
  *_384 | *_768)
    STAGES=(stage3_sft) STAGE3_SIZE=${ROW##*_} STAGE3_ADAPTER_LR=1e-3
    STAGE3_DATA=${DATA_ROOT:-data}/llava_next.yaml
    LLM=${LLM:-Qwen/Qwen2-0.5B-Instruct} TEMPLATE=${TEMPLATE:-qwen_2}
    ;;
esac
case $ROW in
  learned_*) ROPE_FROM=never ;;
  rope_*) ROPE_FROM=stage1 POSITION_EMBEDDING=none ;; # else Stage I would have no positions at all
esac
source scripts/comp/paper.sh
