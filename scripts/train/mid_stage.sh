#!/usr/bin/env bash
# LLaVA-OneVision, stage 1.5: the whole model, on high-quality knowledge. START is stage 1's mm_projector.bin.
set -euo pipefail
# shellcheck source=scripts/train/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-$DATA_ROOT/mid_stage.yaml}
START=${START:-$OUTPUT_ROOT/pretrain/mm_projector.bin}
GLOBAL_BATCH=256 BATCH_PER_DEVICE=1
train mid_stage \
  --model_name_or_path "$LLM" \
  --vision_tower "$VISION_TOWER" \
  "${PROJECTOR[@]}" \
  --pretrain_mm_mlp_adapter "$START" \
  "${WHOLE_MODEL[@]}" \
  --image_aspect_ratio anyres_max_4 \
  --model_max_length 32768 \
  "$@"
