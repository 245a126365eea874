#!/usr/bin/env bash
# Tab. 2: how good is a tower for an LMM, when the tower itself does not train? Trains, then evaluates where lmms-eval is installed.
#   bash scripts/comp/vfm_for_lmm.sh comp-siglip:runs/comp_1b_siglip/stage2_native [FLAGS of the training...]
#   ROPE_FROM=never bash scripts/comp/vfm_for_lmm.sh comp-dinov2:facebook/dinov2-large             an original VFM
#   ROPE_FROM=never STAGE3_SIZE=768 bash scripts/comp/vfm_for_lmm.sh comp-siglip2:google/siglip2-so400m-patch16-naflex
# Its values: presets/vfm_for_lmm.sh. A run per tower: OUTPUT_ROOT is runs/TOWER unless set.
set -euo pipefail

tower=${1:?TOWER is missing: bash scripts/comp/vfm_for_lmm.sh NAME:WEIGHTS [FLAGS...]}
shift
export PRESET=vfm_for_lmm VISION_TOWER=$tower
export OUTPUT_ROOT=${OUTPUT_ROOT:-runs/${tower//[^A-Za-z0-9._-]/_}}
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$scripts/stage3_sft.sh" "$@"
cd "$scripts/../.."
source scripts/shell.sh
find_python
if dry_run || "$PYTHON" -c 'import lmms_eval' 2>/dev/null; then
  LABEL=${LABEL:-$tower} RESULTS=${RESULTS:-$OUTPUT_ROOT/vfm_for_lmm/results} bash scripts/comp/eval.sh "$OUTPUT_ROOT/vfm_for_lmm/stage3_sft" tab2
else
  say "lmms-eval is not installed, so nothing is scored: bash scripts/install_lmms_eval.sh, then this command again."
fi
