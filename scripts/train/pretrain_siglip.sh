#!/usr/bin/env bash
# LLaVA-OneVision, stage 1: the adapter alone, on captions.
set -euo pipefail
# shellcheck source=scripts/train/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-$DATA_ROOT/blip_558k/blip_558k_plain.json}
GLOBAL_BATCH=512 BATCH_PER_DEVICE=16
train pretrain \
  --model_name_or_path "$LLM" \
  --vision_tower "$VISION_TOWER" \
  "${PROJECTOR[@]}" \
  --version plain \
  --mm_tunable_parts mm_mlp_adapter \
  --learning_rate 1e-3 \
  --model_max_length 8192 \
  "$@"
