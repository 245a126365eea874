#!/usr/bin/env bash
# LLaVA-OneVision, stage 2, single images: the whole model on instructions about one image each. START is the stage before.
set -euo pipefail
# shellcheck source=scripts/train/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-$DATA_ROOT/single_image.yaml}
START=${START:-$OUTPUT_ROOT/mid_stage}
GLOBAL_BATCH=256 BATCH_PER_DEVICE=1
train finetune_si \
  --model_name_or_path "$START" \
  "${WHOLE_MODEL[@]}" \
  --image_aspect_ratio anyres_max_9 \
  --video_frames 32 \
  --model_max_length 32768 \
  "$@"
