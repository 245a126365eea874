#!/usr/bin/env bash
# All stages of a preset, one after the other; what is finished already is skipped. Flags given here go to every stage.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
load_preset
for stage in "${STAGES[@]}"; do
  bash "scripts/comp/$stage.sh" "$@"
done
if [[ -n ${AFTER_TRAINING:-} ]] && main_node && ! dry_run; then # DRY_RUN prints the trainings, nothing else.
  bash "$AFTER_TRAINING"
fi
