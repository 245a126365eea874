#!/usr/bin/env bash
# LLaVA-OneVision, stage 2, OneVision: the whole model on single images, several images and videos. START is the stage before.
set -euo pipefail
# shellcheck source=scripts/train/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-$DATA_ROOT/onevision.yaml}
START=${START:-$OUTPUT_ROOT/finetune_si}
GLOBAL_BATCH=256 BATCH_PER_DEVICE=1
train finetune_ov \
  --model_name_or_path "$START" \
  "${WHOLE_MODEL[@]}" \
  --image_aspect_ratio anyres_max_9 \
  --video_frames 32 \
  --model_max_length 32768 \
  "$@"
